"""What a policy does to whole networks, and keeping the best policy of a training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from backdoor_gym.metrics import der
from backdoor_gym.policies import finish
from backdoor_gym.progress import bar

from .look_ahead import LookAhead
from .onp import ONP
from .school import ENVIRONMENT


@dataclass(frozen=True)
class Outcome:
    """One episode on one model: ACC on test images where there are any; ASR and DER None where there is no backdoor."""

    infected: str
    acc: float
    acc_drop: float
    asr: float | None
    der: float | None
    pruned: int
    reward: float


def run(policy: Any, env: gym.Env[Any, Any], infected: Sequence[Any]) -> list[Outcome]:
    """Let a policy repair each model once, with the figures that the environment itself reports."""
    outcomes = []
    for name in infected:
        observation, before = env.reset(seed=0, options={"infected": name})
        after, total, done, state = before, 0.0, False, None
        start = np.ones(1, dtype=bool)
        while not done:
            action, state = policy.predict(observation, state, start, deterministic=True)
            start = np.zeros(1, dtype=bool)
            observation, reward, terminated, truncated, after = env.step(int(action))
            total, done = total + float(reward), terminated or truncated
        total += finish(policy, env)
        after = env.unwrapped.info()  # type: ignore[attr-defined]
        acc = "test_acc" if "test_acc" in after else "acc"
        asr = after.get("asr")
        rating = None if asr is None else der(before[acc], before["asr"], after[acc], asr)
        outcomes.append(Outcome(str(name), after[acc], before[acc] - after[acc], asr, rating, after["pruned"], total))
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over the models.

    Of ACC, neurons pruned and return over all, of ASR and DER over the infected ones, and the share of clean ones that
    were left untouched.
    """
    infected = [one for one in outcomes if one.asr is not None]
    clean = [one for one in outcomes if one.asr is None]
    figures = {
        "acc": fmean(one.acc for one in outcomes),
        "acc_drop": fmean(one.acc_drop for one in outcomes),
        "pruned": fmean(one.pruned for one in outcomes),
        "return": fmean(one.reward for one in outcomes),
    }
    if infected:
        figures["asr"] = fmean(one.asr for one in infected if one.asr is not None)
        figures["der"] = fmean(one.der for one in infected if one.der is not None)
    if clean:
        figures["untouched"] = fmean(one.pruned == 0 for one in clean)
    return figures


class Validation(BaseCallback):
    """Runs the policy on models kept for choices, logs the means as ``val/...``, and keeps the best policy in a file.

    Best is the largest mean return, which pays for what was repaired, for accuracy, and for leaving clean models alone.

    Args:
        onp: what is being trained.
        infected: names of models that are not trained on.
        path: file of the best policy; where it exists it is beaten only by a better one.
        every: rollouts between two validations.
        report: called with the figures of each validation.
        acting: what acts in an environment, where it is not ``onp`` itself: agents of layers that share it.
        options: of the environment.
    """

    def __init__(
        self,
        onp: ONP,
        infected: Sequence[str],
        path: str | Path,
        every: int = 5,
        report: Callable[[dict[str, float]], None] | None = None,
        acting: Callable[[gym.Env[Any, Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.onp, self.names, self.path, self.every = onp, list(infected), Path(path), every
        self.report = report
        self.env = gym.make(
            f"backdoor_gym:{ENVIRONMENT}", infected=self.names, reward="oracle", disable_env_checker=True, **options
        )
        self.acting = onp if acting is None else acting(self.env)
        self.best: dict[str, float] | None = None
        self._rollouts = 0

    def _on_training_start(self) -> None:
        if self.path.is_file():
            with torch.random.fork_rng(devices=[]):  # a network draws its first weights
                self.best = ONP.load(self.path).facts.get("validation")
        self._before = list(self.training_env.reset_infos)
        if self.best is None or not self.num_timesteps:  # a training that goes on was validated when it began
            self.validate()

    def progress(self) -> dict[str, Any]:
        """How many rollouts there were, JSON-able."""
        return {"rollouts": self._rollouts}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """Validate when it would have been."""
        self._rollouts = int(progress["rollouts"])

    def _on_step(self) -> bool:
        vector = self.training_env
        for index, (done, after) in enumerate(zip(self.locals["dones"], self.locals["infos"], strict=True)):
            if done:
                before = self._before[index]
                figures = {key: after[key] for key in ("acc", "test_acc", "asr", "pruned") if key in after}
                if "asr" in after:
                    figures["der"] = der(before["test_acc"], before["asr"], after["test_acc"], after["asr"])
                for key, value in figures.items():
                    self.logger.record_mean(f"train/{key}", value)
                self._before[index] = vector.reset_infos[index]
        return True

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        if self._rollouts % self.every == 0:
            self.validate()

    def _on_training_end(self) -> None:
        if self._rollouts % self.every:
            self.validate()

    def validate(self, timesteps: int | None = None) -> dict[str, float]:
        """Validate now; the means, as ``summary`` gives them. ``timesteps`` is for use without a learner that counts them."""
        timesteps = self.num_timesteps if timesteps is None else timesteps
        env, self.onp.env = self.onp.env, self.env
        try:
            figures = summary(run(self.acting, self.env, self.names))
        finally:
            self.onp.env = env
        if hasattr(self, "model"):
            for key, value in figures.items():
                self.logger.record(f"val/{key}", value)
        if self.best is None or figures["return"] > self.best["return"]:
            self.best = figures
            self.onp.facts["validation"] = {**figures, "timesteps": timesteps}
            self.onp.save(self.path)
        if self.report is not None:
            self.report({**figures, "timesteps": timesteps})
        return figures


def choose_look_ahead(
    onp: ONP,
    env: gym.Env[Any, Any],
    infected: Sequence[str],
    choices: Sequence[LookAhead | None],
    progress: bool = False,
) -> dict[LookAhead | None, float]:
    """Give a policy the look-ahead of the largest mean return on these models; the mean return of each choice.

    ``progress`` draws a bar.
    """
    ratings: dict[LookAhead | None, float] = {}
    for choice in bar(choices, "look-aheads", len(choices), progress):
        onp.look_ahead = choice
        ratings[choice] = summary(run(onp, env, infected))["return"]
    onp.look_ahead = max(ratings, key=ratings.__getitem__)
    return ratings


def choose_threshold(
    onp: ONP, env: gym.Env[Any, Any], infected: Sequence[str], choices: Sequence[float], progress: bool = False
) -> dict[float, tuple[int, int]]:
    """Give a policy the threshold of the verdict that misses the fewest of these models' backdoors.

    Of several the one that leaves the most clean models alone, for a missed backdoor costs far more than a needless
    repair; and of those the largest, for clean networks of other kinds than these come out higher.

    Args:
        onp: the policy.
        env: an environment of these models that scores them: an ASR in its info is how it says that there is a backdoor.
        infected: names of the models.
        choices: thresholds.
        progress: whether to draw a bar.

    Returns:
        Of each choice how many infected models have a verdict below it, and how many clean ones have not.
    """
    verdicts, backdoors = [], []
    for name in bar(infected, "verdicts", len(infected), progress):
        observation, info = env.reset(seed=0, options={"infected": name})
        verdicts.append(onp.verdict(observation))
        backdoors.append("asr" in info)
    wrong = {
        choice: (
            sum(verdict < choice for verdict, there in zip(verdicts, backdoors, strict=True) if there),
            sum(verdict >= choice for verdict, there in zip(verdicts, backdoors, strict=True) if not there),
        )
        for choice in choices
    }
    onp.verdict_threshold = min(choices, key=lambda choice: (*wrong[choice], -choice))
    return wrong
