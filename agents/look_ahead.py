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

#: Suspected danger below which a repair may end because it levels off.
LOW = 0.2
#: Fall of the suspected danger in ``LookAhead.patience`` prunes below which it levels off.
LEAST_FALL = 0.02


@dataclass(frozen=True)
class LookAhead:
    """Corrects the logits of the best few candidates by what each would do to the figures on the clean images.

    logit + danger_weight * (fall of the suspected danger) - loss_weight * (rise of the clean cross-entropy), where a fall of
    the cross-entropy counts as none; a candidate that would break the accuracy budget is out.

    Attributes:
        candidates: how many of the largest logits are looked at.
        loss_weight: per unit of cross-entropy.
        danger_weight: per unit of suspected danger.
        done: suspected danger; a repair that has brought it below ends.
        patience: prunes in which the suspected danger, once low, has to fall further (``LOW``, ``LEAST_FALL``), or the
            repair ends; 0 for no such end.
        restore: what a pruned neuron has to be worth at the end, in units of the logits, not to be given back
            (``restoring.restore``); 0 to give none back.
    """

    candidates: int = 20
    loss_weight: float = 3.0
    danger_weight: float = 0.0
    done: float = 0.0
    patience: int = 0
    restore: float = 0.0

    def is_done(self, observation: Mapping[str, np.ndarray], env: Any, environment: int) -> bool:
        """Whether the suspected danger fell below ``done``, or levels off: where it never was above, it says nothing.

        Whether it levels off only the environment knows; it may be None.
        """
        now, fall = observation["globals"][[_DANGER, _FALL]]
        if now < self.done <= now + fall:
            return True
        if not self.patience or env is None or not now < LOW <= now + fall:
            return False
        lately = ask(env, environment, "suspected_fall", self.patience)
        return lately is not None and lately < LEAST_FALL

    def correct(
        self, logits: np.ndarray, observation: Mapping[str, np.ndarray], env: Any, environment: int
    ) -> np.ndarray:
        """Logits, float (N + 1,): corrected where it matters, that of stopping (the last) as it was, else minus infinity.

        The clean images cost far more to look at than the suspected danger. So candidates are taken in the order of what
        they may reach at best, and none is looked at any closer once another has more than that.
        """
        figures = observation["globals"]
        tolerated = figures[_ACCURACY] + figures[_DROP] - figures[_BUDGET] - 1e-6
        legal = np.flatnonzero(observation["action_mask"][:-1])
        chosen = legal[np.argsort(-logits[legal], kind="stable")[: self.candidates]]
        hopes = logits[chosen].astype(np.float64)
        if self.danger_weight:
            falls = [figures[_DANGER] - ask(env, environment, "suspect_also", [int(unit)]) for unit in chosen]
            hopes += self.danger_weight * np.array(falls)
        corrected = np.full_like(logits, -np.inf)
        corrected[-1] = logits[-1]
        loss: float | None = None
        for index in np.argsort(-hopes, kind="stable"):
            if hopes[index] <= corrected[:-1].max():
                break
            unit = chosen[index]
            seen = ask(env, environment, "evaluate_also", [int(unit)])
            if seen.acc < tolerated:
                continue
            if loss is None:
                loss = ask(env, environment, "evaluate_also", []).loss
            corrected[unit] = hopes[index] - self.loss_weight * max(0.0, seen.loss - loss)
        return corrected
