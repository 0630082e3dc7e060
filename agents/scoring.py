"""A policy from three things: a scorer of the units, a look-ahead, and thresholds of stopping."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from backdoor_gym.analysis.evidence import VERDICT_THRESHOLD
from backdoor_gym.arguments import check_kind, is_finite
from backdoor_gym.envs.observation import GLOBAL_FEATURES, NODE_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError
from backdoor_gym.policies.contract import KEYS, Observation, Policy, ask, check_env, stop_action
from backdoor_gym.wording import shown

from .backward_elimination import restore
from .look_ahead import LookAhead

_PRUNED, _TRIED = (NODE_FEATURES.index(name) for name in ("pruned", "tried"))
_VERDICT = GLOBAL_FEATURES.index("verdict")


class Scorer(Protocol):
    """What tells which unit is to be pruned first: ONP's network, a ridge regression, one feature."""

    def scores(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of one observation or a batch, float32 (n, N + 1): log odds of each unit, and of stopping (-inf for never)."""


class ScoringPolicy(Policy):
    """Stops where going on is too unlikely or the look-ahead says so, and else prunes the unit that it leaves the best.

    Args:
        scorer: what scores units and stopping.
        env: the environment to act and look ahead in; None for a policy that only acts on observations.
        look_ahead: what corrects the scores in ``env``, ends repairs and gives back at their end; None for nothing of it.
        threshold: probability of going on, with any unit, below which a deterministic action is to stop.
        verdict_threshold: probability of a backdoor (``analysis.evidence``) below which it is to stop before the first prune,
            and from which on it is not; 0 to prune in any case.
        seed: of actions that are not deterministic: they are drawn from the scores, without looking ahead.

    Raises:
        DataError: a threshold is out of range, or no look-ahead.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.agents import LookAhead, ScoringPolicy
        >>> from backdoor_gym.baselines import Ridge
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> policy = ScoringPolicy(Ridge.load(), env, look_ahead=LookAhead())
        >>> action, _ = policy.predict(observation, deterministic=True)
        >>> env.step(action)[-1]["neuron"]
        'layer2.0.conv1[14]'
    """

    def __init__(
        self,
        scorer: Scorer,
        env: Any = None,
        *,
        look_ahead: LookAhead | None = None,
        threshold: float = 0.5,
        verdict_threshold: float = VERDICT_THRESHOLD,
        seed: int | None = None,
    ) -> None:
        for name, value in (("threshold", threshold), ("verdict_threshold", verdict_threshold)):
            if not is_finite(value) or not 0 <= value < 1:
                raise DataError(f"{name} must be at least 0 and less than 1, it is {shown(value)}")
        check_kind("look_ahead", look_ahead, LookAhead, "a LookAhead", may_be_none=True)
        self.scorer = scorer
        self.look_ahead = look_ahead
        self.threshold, self.verdict_threshold = threshold, verdict_threshold
        self._random = np.random.default_rng(seed)
        self.set_env(env)

    def logits(self, observation: Observation) -> np.ndarray:
        """The scores of one observation or a batch, float32 (n, N + 1)."""
        return self.scorer.scores(observation)

    def act(self, observation: Observation, environment: int) -> int:
        """The deterministic action."""
        return self._best(self.logits(observation)[0], observation, environment)

    def act_on(self, observations: Sequence[Observation], deterministic: bool) -> list[int]:
        actions = []
        rows = self.logits({key: np.stack([observation[key] for observation in observations]) for key in KEYS})
        for environment, (observation, row) in enumerate(zip(observations, rows, strict=True)):
            if deterministic:
                actions.append(self._best(row, observation, environment))
            else:
                row = np.where(observation["action_mask"].astype(bool), row, -np.inf)
                chances = np.exp(row - row.max())
                actions.append(int(self._random.choice(len(row), p=chances / chances.sum())))
        return actions

    def _best(self, scores: np.ndarray, observation: Observation, environment: int) -> int:
        scores = np.where(observation["action_mask"].astype(bool), scores, -np.inf)
        # No single unit of hundreds could outweigh stopping, so all together are weighed against it.
        going_on = np.logaddexp.reduce(scores[:-1].astype(np.float64))
        begun = bool(observation["nodes"][:, [_PRUNED, _TRIED]].any())
        look = self.look_ahead
        if look is not None and self.env is not None:
            check_env(self, self.env, environment, observation)
        if not begun and observation["globals"][_VERDICT] < self.verdict_threshold:
            return stop_action(observation)
        if begun and self.threshold and going_on < scores[-1] + np.log(self.threshold / (1 - self.threshold)):
            return stop_action(observation)
        if look is not None and self.env is None and look.is_done(observation):
            return stop_action(observation)
        if look is not None and self.env is not None:
            seen = {key: observation[key] for key in ("globals", "action_mask")}
            corrected = ask(self.env, environment, "consult", partial(look.look, scores, seen))
            if corrected is None:
                return stop_action(observation)
            scores = corrected
        best = int(scores[:-1].argmax())
        return stop_action(observation) if np.isneginf(scores[best]) else best

    def finish(self, env: BackdoorPruneEnv) -> float:
        """After an episode: give back what need not have been pruned, if the look-ahead says so. The reward of it."""
        if self.look_ahead is None or not self.look_ahead.restore:
            return 0.0
        return restore(env.session, self.look_ahead, env.worth)
