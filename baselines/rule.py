"""A published pruning defence: a score of each neuron, a threshold on it, a mask."""

import warnings
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from backdoor_gym.arguments import check_kind, check_real
from backdoor_gym.data.datasets import check_images
from backdoor_gym.envs.observation import GLOBAL_FEATURES
from backdoor_gym.errors import DataError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.metrics import accuracy, require_finite
from backdoor_gym.networks.weights import check_finite
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.policies.contract import Observation, Policy, ask, check_env, stop_action
from backdoor_gym.policies.thresholds import AUTO, BUDGET, Threshold, check_threshold, choose_threshold
from backdoor_gym.session import RepairSession
from backdoor_gym.session.defender import Defender
from backdoor_gym.wording import shown

ACCURACY_BUDGET = 0.02
_STEPS_LEFT, _BUDGET = (GLOBAL_FEATURES.index(name) for name in ("steps_left", "accuracy_budget"))


class Rule(Policy):
    """Prunes what scores above the threshold, the largest first (of equals the one nearer to the images), then stops.

    A rule adds ``scores``, and the threshold of its paper. It runs as published with ``accuracy_budget=None``; with a budget
    each prune that breaks it is undone, and the rule goes on with the next. A pruned neuron gives zero: its weight and
    its bias go, also where published code (of BNP, EP, ANP, RNP) leaves the bias of the batch normalisation.

    Args:
        env: the environment that gives network and clean images.
        threshold: a number; "auto" for the lowest within ``accuracy_budget`` (``thresholds.choose_threshold``); "budget"
            for none, where an accuracy budget of the environment ends the repair; None for the published one, or "auto".
        accuracy_budget: clean accuracy that "auto" may lose.

    Attributes:
        reads_images: whether the scores depend on the clean images.
        published: the published threshold, or None.
        symbol: what the paper calls the threshold.
        scored: which neurons have a score.

    Raises:
        DataError: an unusable argument, or "budget" in an environment without one.

    Examples:
        >>> import gymnasium as gym
        >>> import numpy as np
        >>> from backdoor_gym.baselines import Rule
        >>> class LastFirst(Rule):
        ...     def scores(self, defender):
        ...         return np.arange(len(defender.neurons), dtype=float)
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> LastFirst(env, "budget").predict(observation)[0].item()
        599
    """

    reads_derivatives = False
    reads_images: ClassVar[bool] = True
    published: ClassVar[float | None] = None
    symbol: ClassVar[str] = "threshold"
    scored: ClassVar[str] = "neurons"

    def __init__(
        self,
        env: Any,
        threshold: Threshold | None = None,
        accuracy_budget: float = ACCURACY_BUDGET,
    ) -> None:
        check_real("accuracy_budget", accuracy_budget, 0, 1)
        if threshold is None:
            threshold = "auto" if self.published is None else self.published
        check_threshold(threshold)
        self.threshold: Threshold = threshold
        self.accuracy_budget = accuracy_budget
        self._scores: dict[int, np.ndarray] = {}
        self._chosen: dict[int, float] = {}
        self.set_env(env)

    @abstractmethod
    def scores(self, defender: Defender) -> np.ndarray:
        """Score of each neuron, float64 (neurons,): the larger, the sooner pruned; minus infinity for never."""

    def settings(self) -> dict[str, float | str]:
        """The threshold; where it is chosen, the one of the last episode in the first environment, "all" if all may go."""
        if self.threshold != AUTO:
            return {self.symbol: self.threshold if self.threshold == BUDGET else float(self.threshold)}
        if 0 not in self._chosen:
            return {}
        return {self.symbol: self._chosen[0] if np.isfinite(self._chosen[0]) else "all"}

    def set_env(self, env: Any) -> None:
        super().set_env(env)
        self._scores.clear()

    def begin(self, environment: int) -> None:
        self._scores.pop(environment, None)

    def act(self, observation: Observation, environment: int) -> int:
        if environment not in self._scores or observation["globals"][_STEPS_LEFT] == 1:
            scores = self.scores_in(observation, environment)
            self._chosen[environment] = self._choose(scores, observation, environment)
            self._scores[environment] = scores
        scores = self._scores[environment]
        open_scores = np.where(observation["action_mask"][: len(scores)] == 1, scores, -np.inf)
        best = int(open_scores.argmax())
        return best if open_scores[best] > self._chosen[environment] else stop_action(observation)

    def __getstate__(self) -> dict[str, Any]:
        """Without the environment: it may be in another process, where the scores are then computed."""
        return {**self.__dict__, "env": None}

    def unit_scores(self, session: RepairSession) -> np.ndarray:
        """Of each unit the largest score of its neurons, float64 (units,)."""
        scores = self.scores(session.defender)
        return np.array([scores[unit].max() for unit in session.defender.units])

    def scores_in(self, observation: Observation, environment: int) -> np.ndarray:
        """Score of each unit of the network of that environment, float64 (units,)."""
        check_env(self, self.env, environment, observation)
        return self.checked(ask(self.env, environment, "consult", self.unit_scores))

    def checked(self, scores: np.ndarray) -> np.ndarray:
        """The scores; warns where the rule can prune nothing.

        Raises:
            WeightsError: a score is NaN or infinite.
        """
        require_finite(f"a score of {type(self).__name__}", torch.from_numpy(scores[scores != -np.inf]))
        if not (scores > -np.inf).any():
            warnings.warn(
                f"{type(self).__name__} prunes {self.scored} alone, and this network has none: nothing is pruned",
                stacklevel=2,
            )
        return scores

    def _choose(self, scores: np.ndarray, observation: Observation, environment: int) -> float:
        if self.threshold == BUDGET:
            if observation["globals"][_BUDGET] >= 1:
                raise DataError(
                    'the threshold "budget" needs an accuracy budget that ends the repair, and none was given'
                )
            return -np.inf
        if self.threshold != AUTO:
            return float(self.threshold)
        check_env(self, self.env, environment, observation)
        chosen: float = ask(self.env, environment, "consult", partial(_choose_in, scores, self.accuracy_budget))
        return chosen

    @classmethod
    def prune(
        cls,
        network: nn.Module,
        clean: tuple[Tensor, Tensor] | None = None,
        *arguments: Any,
        inplace: bool = False,
        **options: Any,
    ) -> nn.Module:
        """A copy of the network, or itself, with the neurons that the rule finds set to zero.

        Args:
            network: any classifier that torch.fx can trace.
            clean: images float32 (n, C, H, W) in [0, 1] and labels int64 (n,); None will do where ``reads_images`` is False
                and the threshold is a number.
            *arguments: of the rule, those behind ``env``: the threshold (not "budget"), the accuracy budget of "auto", ...
            inplace: whether to change the network itself.
            **options: of the rule, by name.

        Raises:
            UntraceableError: the network's neurons cannot be found.
            DataError: an unusable threshold or unusable images.
        """
        rule = cls(None, *arguments, **options)
        if rule.threshold == BUDGET:
            raise DataError('the threshold "budget" is for an environment; use "auto"')
        check_kind("the network", network, nn.Module, "a torch.nn.Module (of an InfectedModel its .network)")
        check_finite(network)
        if clean is None and (cls.reads_images or rule.threshold == AUTO):
            raise DataError(f"{cls.__name__} needs clean images here: clean=(images, labels)")
        images, labels = (torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)) if clean is None else _pair(clean)
        neurons = find_neurons(network, None if clean is None else images)
        scores = rule.checked(rule.scores(Defender(network, neurons, neurons.units(), images, labels)))
        chosen = rule.threshold
        if chosen == AUTO:
            masked = MaskedNetwork(neurons, images, next(neurons.graph.parameters()).device)
            chosen = choose_threshold(
                scores, lambda pruned: accuracy(masked.logits(~pruned).cpu(), labels.cpu()), rule.accuracy_budget
            )
        return write_mask(network, neurons, ~(scores > float(chosen)), inplace)


def _choose_in(scores: np.ndarray, accuracy_budget: float, session: RepairSession) -> float:
    return choose_threshold(scores, lambda pruned: session.peek(np.flatnonzero(pruned)).acc, accuracy_budget)


def _pair(clean: Any) -> tuple[Tensor, Tensor]:
    """Images and labels; raises ``DataError`` of anything else."""
    if not isinstance(clean, tuple | list) or len(clean) != 2:
        raise DataError(f"clean images must be a pair (images, labels), not {shown(clean)}")
    check_images(*clean)
    return clean[0], clean[1]
