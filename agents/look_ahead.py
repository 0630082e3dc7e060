"""One-step look-ahead: what a defender may know of a candidate prune before it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from itertools import islice
from math import isfinite

import numpy as np

from backdoor_gym.envs.observation import GLOBAL_FEATURES
from backdoor_gym.errors import DataError
from backdoor_gym.session import RepairSession

#: Candidates that a step takes up at most, where those before them break the accuracy budget.
MOST = 100
#: Suspected danger below which a repair may end because it levels off.
LOW = 0.5
#: Fall of the suspected danger in ``LookAhead.patience`` prunes below which it levels off.
LEAST_FALL = 0.02
_DANGER, _FALL = (GLOBAL_FEATURES.index(name) for name in ("suspected_danger", "suspected_drop"))
#: What has been looked at of a candidate; of two that may reach the same, the one that was looked at less comes first.
_NOTHING, _ITS_DANGER, _ALL = range(3)


@dataclass(frozen=True)
class LookAhead:
    """Corrects the scores of the best few candidates by what each would do to the figures on the clean images.

    score + danger_weight * (fall of the suspected danger) - loss_weight * (rise of the clean cross-entropy), where a fall of
    the cross-entropy counts as none; a candidate that would break the accuracy budget is out. The defaults are those of
    the policy that comes with the package.

    Attributes:
        candidates: how many of the largest scores are looked at, without those that break the accuracy budget.
        loss_weight: per unit of cross-entropy.
        danger_weight: per unit of suspected danger.
        done: suspected danger below which a repair ends that began above it.
        patience: prunes in which the suspected danger, once it is low (``LOW``), must fall by ``LEAST_FALL``, or the repair
            ends; 0 for no such end.
        restore: whether neurons that it can do without are given back at the end (``backward_elimination.restore``).

    Raises:
        DataError: no candidate, or a number that is not finite.

    Examples:
        >>> from backdoor_gym.agents import LookAhead
        >>> LookAhead(candidates=5)
        LookAhead(candidates=5, loss_weight=100.0, danger_weight=10.0, done=0.09, patience=15, restore=True)
    """

    candidates: int = 10
    loss_weight: float = 100.0
    danger_weight: float = 10.0
    done: float = 0.09
    patience: int = 15
    restore: bool = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise DataError(f"a look-ahead takes at least one candidate, not {self.candidates}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isfinite(value):
                raise DataError(f"{field.name} of a look-ahead must be a finite number, not {value}")

    def is_done(self, observation: Mapping[str, np.ndarray], session: RepairSession | None = None) -> bool:
        """Whether the suspected danger fell below ``done``, or levels off, which only the session tells."""
        now, fall = observation["globals"][[_DANGER, _FALL]]
        if now < self.done <= now + fall:
            return True
        if not self.patience or session is None or not now < LOW <= now + fall:
            return False
        lately = session.suspected_fall(self.patience)
        return lately is not None and lately < LEAST_FALL

    def look(
        self, scores: np.ndarray, observation: Mapping[str, np.ndarray], session: RepairSession
    ) -> np.ndarray | None:
        """The corrected scores, or None where the repair is done."""
        return None if self.is_done(observation, session) else self.correct(scores, observation, session)

    def correct(self, scores: np.ndarray, observation: Mapping[str, np.ndarray], session: RepairSession) -> np.ndarray:
        """The corrected scores, float (N + 1,): of stopping (the last) as it was, of what is no better than the best -inf.

        Candidates are looked at in the order of what each may reach at most: the suspected danger cannot fall below 0,
        and the loss only takes away. The search ends with the first that is seen whole: no other is better. A candidate
        that breaks the budget gives its place to the next, for the rest of the episode.
        """
        danger = float(observation["globals"][_DANGER])
        legal = np.flatnonzero(observation["action_mask"][:-1])
        open_units = legal[~session.state.over_budget[legal]]
        waiting = iter(open_units[np.argsort(-scores[open_units], kind="stable")][:MOST])
        now = session.peek_clean([])
        assert now is not None  # what is pruned keeps the budget
        corrected = np.full_like(scores, -np.inf)
        corrected[-1] = scores[-1]
        queue: list[tuple[float, int, int]] = []  # minus what a candidate may reach, the candidate, what was looked at

        def take_up(count: int) -> None:
            for unit in islice(waiting, count):
                heappush(queue, (-(float(scores[unit]) + self.danger_weight * danger), int(unit), _NOTHING))

        take_up(self.candidates)
        while queue:
            least, unit, seen = heappop(queue)
            if seen == _ALL:
                break
            if seen == _NOTHING and self.danger_weight:
                least += self.danger_weight * session.peek_danger([unit])
                heappush(queue, (least, unit, _ITS_DANGER))
            elif (clean := session.peek_clean([unit])) is None:
                take_up(1)
            else:
                least += self.loss_weight * max(0.0, clean[1] - now[1])
                corrected[unit] = -least
                heappush(queue, (least, unit, _ALL))
        return corrected
