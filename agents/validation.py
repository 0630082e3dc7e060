"""What a policy does to whole networks, and keeping the best policy of a training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback

from backdoor_gym.metrics import der
from backdoor_gym.policies.contract import run_episode

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
        reward = run_episode(policy, env, observation)
        after = env.unwrapped.info()  # type: ignore[attr-defined]
        acc = "test_acc" if "test_acc" in after else "acc"
        asr = after.get("asr")
        rating = None if asr is None else der(before[acc], before["asr"], after[acc], asr)
        outcomes.append(Outcome(str(name), after[acc], before[acc] - after[acc], asr, rating, after["pruned"], reward))
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over the models: of ASR and DER over infected ones, and the share of clean ones that were left untouched."""
    infected = [outcome for outcome in outcomes if outcome.asr is not None]
    clean = [outcome for outcome in outcomes if outcome.asr is None]
    figures = {
        "acc": fmean(outcome.acc for outcome in outcomes),
        "acc_drop": fmean(outcome.acc_drop for outcome in outcomes),
        "pruned": fmean(outcome.pruned for outcome in outcomes),
        "return": fmean(outcome.reward for outcome in outcomes),
    }
    if infected:
        figures["asr"] = fmean(outcome.asr for outcome in infected if outcome.asr is not None)
        figures["der"] = fmean(outcome.der for outcome in infected if outcome.der is not None)
    if clean:
        figures["untouched"] = fmean(outcome.pruned == 0 for outcome in clean)
    return figures


class Validation(BaseCallback):
    """Runs the policy on models kept for choices, logs the means as ``val/...``, and keeps the best policy in a file.

    Best is the largest mean return, which pays for what was repaired, for accuracy, and for leaving clean models alone.

    Args:
        onp: what is trained.
        infected: names of models that are not trained on.
        path: file of the best policy; where it exists, only a better one replaces it.
        every: rollouts between two validations.
        report: called with the figures of each validation.
        options: of the environment.
    """

    def __init__(
        self,
        onp: ONP,
        infected: Sequence[str],
        path: str | Path,
        every: int = 5,
        report: Callable[[dict[str, float]], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.onp, self.names, self.path, self.every = onp, list(infected), Path(path), every
        self.report = report
        self.env = gym.make(ENVIRONMENT, infected=self.names, reward="oracle", disable_env_checker=True, **options)
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
        for index, (done, after) in enumerate(zip(self.locals["dones"], self.locals["infos"], strict=True)):
            if done:
                before = self._before[index]
                figures = {key: after[key] for key in ("acc", "test_acc", "asr", "pruned") if key in after}
                if "asr" in after:
                    figures["der"] = der(before["test_acc"], before["asr"], after["test_acc"], after["asr"])
                for key, value in figures.items():
                    self.logger.record_mean(f"train/{key}", value)
                self._before[index] = self.training_env.reset_infos[index]
        return True

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        if self._rollouts % self.every == 0:
            self.validate()

    def _on_training_end(self) -> None:
        if self._rollouts % self.every:
            self.validate()

    def validate(self, timesteps: int | None = None) -> None:
        """Validate now; ``timesteps`` is for use without a learner that counts them."""
        timesteps = self.num_timesteps if timesteps is None else timesteps
        env, self.onp.env = self.onp.env, self.env
        try:
            figures = summary(run(self.onp, self.env, self.names))
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
