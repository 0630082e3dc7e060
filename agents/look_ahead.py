"""One-step look-ahead: what a defender may know of the next prune before it is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backdoor_gym.baselines.policy import ask
from backdoor_gym.envs.observation import GLOBAL_FEATURES

_ACCURACY, _DROP, _BUDGET = (GLOBAL_FEATURES.index(name) for name in ("accuracy", "accuracy_drop", "accuracy_budget"))


@dataclass(frozen=True)
class LookAhead:
    """Corrects the logits by what each prune would do on the clean images: to first order, or tried out.

    First order looks at all neurons at once, where the repair now stands: logit + slope_weight * benefit, with the
    ``benefit`` of ``backdoor_gym.envs.victim.Slopes``. Trying out is exact, and costs an evaluation a candidate:
    logit - loss_weight * (rise of the clean cross-entropy) + danger_weight * (fall of the suspected danger); a candidate
    that would break the accuracy budget is out. The odds of stopping stay as they were.

    Attributes:
        slope_weight: per unit of first-order benefit; 0 for none.
        every: prunes after which the derivatives are taken anew.
        candidates: how many of the largest logits are tried out; 0 for none.
        loss_weight: per unit of cross-entropy.
        danger_weight: per unit of suspected danger.
    """

    slope_weight: float = 1.0
    every: int = 4
    candidates: int = 0
    loss_weight: float = 3.0
    danger_weight: float = 10.0

    def correct(
        self, logits: np.ndarray, observation: Mapping[str, np.ndarray], env: Any, environment: int
    ) -> np.ndarray:
        """Logits, float (N + 1,); those of neurons that were not tried out, if any were, at minus infinity."""
        legal = np.flatnonzero(observation["action_mask"][:-1])
        corrected = logits.copy()
        if self.slope_weight and len(legal):
            benefit = ask(env, environment, "slopes", self.every).benefit
            corrected[legal] += self.slope_weight * benefit[legal]
            corrected[legal] += _total(logits[legal]) - _total(corrected[legal])
        return self._tried_out(corrected, legal, observation, env, environment) if self.candidates else corrected

    def _tried_out(
        self, logits: np.ndarray, legal: np.ndarray, observation: Mapping[str, np.ndarray], env: Any, environment: int
    ) -> np.ndarray:
        figures = observation["globals"]
        initial_accuracy = figures[_ACCURACY] + figures[_DROP]
        corrected = np.full_like(logits, -np.inf)
        corrected[-1] = logits[-1]
        base = ask(env, environment, "evaluate_also", [])
        for unit in legal[np.argsort(-logits[legal], kind="stable")[: self.candidates]]:
            seen = ask(env, environment, "evaluate_also", [int(unit)])
            if initial_accuracy - seen.acc > figures[_BUDGET] + 1e-6:
                continue
            rise, fall = seen.loss - base.loss, base.suspected_danger - seen.suspected_danger
            corrected[unit] = logits[unit] - self.loss_weight * rise + self.danger_weight * fall
        return corrected


def _total(logits: np.ndarray) -> float:
    """Log of the sum of their exponentials."""
    return float(np.logaddexp.reduce(logits.astype(np.float64)))
