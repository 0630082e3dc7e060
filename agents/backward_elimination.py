"""Giving back what a repair need not have pruned.

Backward elimination after forward selection (Marill and Green, "On the effectiveness of receptors in recognition systems",
1963).
"""

import numpy as np

from backdoor_gym.session import RepairSession
from backdoor_gym.session.session import Worth

from .look_ahead import LookAhead

#: Fall of the suspected danger over a repair below which it does not tell which prunes were good.
LEAST_FALL = 0.1


def restore(session: RepairSession, look: LookAhead, worth: Worth | None = None) -> float:
    """Give back the pruned units of a finished repair that it can do without; what that is worth.

    The units that the suspected danger needs least come first. A unit is given back where the clean cross-entropy does not
    rise, the accuracy budget holds and the suspected danger stays below ``LookAhead.done``, or does not rise.
    """
    total = 0.0
    if session.initial_figures.suspected_danger - session.figures.suspected_danger < LEAST_FALL:
        return total
    units = np.flatnonzero(session.state.pruned)
    dangers = [session.peek_danger([], restored=[int(unit)]) for unit in units]
    for unit in units[np.argsort(dangers, kind="stable")]:
        now, without = session.peek_clean([]), session.peek_clean([], restored=[int(unit)])
        if without is None or (now is not None and without[1] > now[1]):
            continue
        danger = session.peek_danger([], restored=[int(unit)])
        if danger <= max(look.done, session.figures.suspected_danger):
            total += session.restore(int(unit), worth)
    return total
