"""One-step look-ahead: what a defender may know of a candidate prune before it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum, auto
from heapq import heappop, heappush
from itertools import islice
from math import isfinite
from typing import Any

import numpy as np

from backdoor_gym.baselines.policy import ask
from backdoor_gym.envs.observation import GLOBAL_FEATURES
from backdoor_gym.errors import DataError

_DANGER, _FALL = (GLOBAL_FEATURES.index(name) for name in ("suspected_danger", "suspected_drop"))

#: Candidates that may be taken up in one step, where those before them break the accuracy budget.
MOST = 100

#: Suspected danger below which a repair may end because it levels off.
LOW = 0.5
#: Fall of the suspected danger in ``LookAhead.patience`` prunes below which it levels off.
LEAST_FALL = 0.02


@dataclass(frozen=True)
class LookAhead:
    """Corrects the logits of the best few candidates by what each would do to the figures on the clean images.

    logit + danger_weight * (fall of the suspected danger) - loss_weight * (rise of the clean cross-entropy), where a fall of
    the cross-entropy counts as none; a candidate that would break the accuracy budget is out.

    Attributes:
        candidates: how many of the largest logits are looked at, those that break the accuracy budget not counted.
        loss_weight: per unit of cross-entropy.
        danger_weight: per unit of suspected danger.
        done: suspected danger; a repair that has brought it below ends.
        patience: prunes in which the suspected danger, once low, has to fall further (``LOW``, ``LEAST_FALL``), or the
            repair ends; 0 for no such end.
        restore: what a pruned neuron has to be worth at the end, in units of the logits, not to be given back
            (``restoring.restore``); 0 to give none back.
    """

    candidates: int = 10
    loss_weight: float = 3.0
    danger_weight: float = 0.0
    done: float = 0.0
    patience: int = 0
    restore: float = 0.0

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise DataError(f"a look-ahead takes at least one candidate, not {self.candidates}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isfinite(value):
                raise DataError(f"{field.name} of a look-ahead must be a finite number, not {value}")

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

        Candidates are taken up best first, by what each may reach at most: the suspected danger cannot fall below 0, and
        the loss only takes away. So each is looked at no closer than it takes to know the best. One that breaks the budget
        gives its place to the next, and is passed over for the rest of the episode.
        """
        danger = float(observation["globals"][_DANGER])
        legal = np.flatnonzero(observation["action_mask"][:-1])
        open_units = legal[~ask(env, environment, "too_dear")[legal]]
        waiting = iter(open_units[np.argsort(-logits[open_units], kind="stable")][:MOST])
        now = ask(env, environment, "clean_also", [])
        corrected = np.full_like(logits, -np.inf)
        corrected[-1] = logits[-1]
        queue: list[tuple[float, int, _Seen]] = []  # the least first: minus what a candidate may reach

        def take_up(count: int) -> None:
            for unit in islice(waiting, count):
                heappush(queue, (-(float(logits[unit]) + self.danger_weight * danger), int(unit), _Seen.NOTHING))

        take_up(self.candidates)
        while queue:
            least, unit, seen = heappop(queue)
            if seen is _Seen.ALL:
                break
            if seen is _Seen.NOTHING and self.danger_weight:
                least += self.danger_weight * ask(env, environment, "suspect_also", [unit])
                heappush(queue, (least, unit, _Seen.DANGER))
            elif (clean := ask(env, environment, "clean_also", [unit])) is None:
                take_up(1)
            else:
                least += self.loss_weight * max(0.0, clean[1] - now[1])
                corrected[unit] = -least
                heappush(queue, (least, unit, _Seen.ALL))
        return corrected


class _Seen(IntEnum):
    """What has been looked at of a candidate."""

    NOTHING = auto()
    DANGER = auto()
    ALL = auto()
