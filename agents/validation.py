"""What a policy does to whole networks, and keeping the best policy of a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from backdoor_gym.metrics import der

from .onp import ONP
from .school import ENVIRONMENT


@dataclass(frozen=True)
class Outcome:
    """One episode on one model; ASR and DER are None where it has no backdoor."""

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
        asr = after.get("asr")
        rating = None if asr is None else der(before["acc"], before["asr"], after["acc"], asr)
        outcomes.append(
            Outcome(str(name), after["acc"], before["acc"] - after["acc"], asr, rating, after["pruned"], total)
        )
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over the models: of ACC, pruned and reward over all, of ASR and DER over the infected ones; share of clean
    ones that were left untouched."""
    infected = [one for one in outcomes if one.asr is not None]
    clean = [one for one in outcomes if one.asr is None]
    figures = {
        "acc": np.mean([one.acc for one in outcomes]),
        "acc_drop": np.mean([one.acc_drop for one in outcomes]),
        "pruned": np.mean([one.pruned for one in outcomes]),
        "return": np.mean([one.reward for one in outcomes]),
    }
    if infected:
        figures |= {"asr": np.mean([one.asr for one in infected]), "der": np.mean([one.der for one in infected])}  # type: ignore[misc]
    if clean:
        figures["untouched"] = np.mean([one.pruned == 0 for one in clean])
    return {key: float(value) for key, value in figures.items()}


class Validation(BaseCallback):
    """Runs the policy on models kept for choices, logs the means as ``val/...``, and keeps the weights of the best DER.

    Args:
        onp: what is being trained.
        infected: names of models that are not trained on.
        every: rollouts between two validations.
        options: of the environment.
    """

    def __init__(self, onp: ONP, infected: Sequence[str], every: int = 5, **options: Any) -> None:
        super().__init__()
        self.onp, self.names, self.every = onp, list(infected), every
        self.env = gym.make(ENVIRONMENT, infected=self.names, reward="oracle", **options)
        self.best: dict[str, float] | None = None
        self.history: list[dict[str, float]] = []
        self._weights: dict[str, Any] = {}
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer or []
        if episodes:
            self.logger.record("train/episodes", len(episodes))

    def _on_rollout_start(self) -> None:
        if self._rollouts and self._rollouts % self.every == 0:
            self.validate()
        self._rollouts += 1

    def _on_training_end(self) -> None:
        self.validate()

    def validate(self) -> dict[str, float]:
        """Validate now."""
        env, self.onp.env = self.onp.env, self.env
        try:
            figures = summary(run(self.onp, self.env, self.names))
        finally:
            self.onp.env = env
        figures["timesteps"] = self.num_timesteps
        self.history.append(figures)
        for key, value in figures.items():
            self.logger.record(f"val/{key}", value)
        self.logger.dump(self.num_timesteps)
        if self.best is None or figures["return"] > self.best["return"]:
            self.best = figures
            self._weights = {key: value.clone() for key, value in self.onp.network.state_dict().items()}
        return figures

    def restore(self) -> None:
        """Give the policy the weights of its best validation."""
        if self._weights:
            self.onp.network.load_state_dict(self._weights)
