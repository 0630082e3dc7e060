"""One-step look-ahead: what a defender may know of a candidate prune before it is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backdoor_gym.baselines.policy import ask
from backdoor_gym.envs.observation import GLOBAL_FEATURES

_ACCURACY, _DROP, _BUDGET, _DANGER, _FALL = (
    GLOBAL_FEATURES.index(name)
    for name in ("accuracy", "accuracy_drop", "accuracy_budget", "suspected_danger", "suspected_drop")
)

#: Times ``candidates``, as many are looked at where those before break the accuracy budget.
PATIENCE = 4


@dataclass(frozen=True)
class LookAhead:
    """Corrects the logits of the best few candidates by what each would do to the figures on the clean images.

    logit - loss_weight * (rise of the clean cross-entropy) + danger_weight * (fall of the suspected danger); a candidate
    that would break the accuracy budget is out, and the next largest logit is looked at in its place.

    Attributes:
        candidates: how many of the largest logits are looked at; up to ``PATIENCE`` times as many if some break the budget.
        loss_weight: per unit of cross-entropy.
        danger_weight: per unit of suspected danger.
        done: suspected danger; a repair that has brought it below ends.
    """

    candidates: int = 30
    loss_weight: float = 3.0
    danger_weight: float = 0.0
    done: float = 0.0

    def is_done(self, observation: Mapping[str, np.ndarray]) -> bool:
        """Whether the suspected danger fell below ``done``: where it never was above, it says nothing."""
        now, fall = observation["globals"][[_DANGER, _FALL]]
        return bool(now < self.done <= now + fall)

    def correct(
        self, logits: np.ndarray, observation: Mapping[str, np.ndarray], env: Any, environment: int
    ) -> np.ndarray:
        """Logits, float (N + 1,), with all that was not looked at but stopping (the last) at minus infinity."""
        figures = observation["globals"]
        initial_accuracy = figures[_ACCURACY] + figures[_DROP]
        legal = np.flatnonzero(observation["action_mask"][:-1])
        best = legal[np.argsort(-logits[legal], kind="stable")[: PATIENCE * self.candidates]]
        corrected = np.full_like(logits, -np.inf)
        corrected[-1] = logits[-1]
        base = ask(env, environment, "evaluate_also", [])
        found = 0
        for unit in best:
            if found == self.candidates:
                break
            seen = ask(env, environment, "evaluate_also", [int(unit)])
            if initial_accuracy - seen.acc > figures[_BUDGET] + 1e-6:
                continue
            found += 1
            rise, fall = seen.loss - base.loss, base.suspected_danger - seen.suspected_danger
            corrected[unit] = logits[unit] - self.loss_weight * rise + self.danger_weight * fall
        return corrected
