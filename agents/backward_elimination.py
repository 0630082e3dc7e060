"""Giving back what a repair need not have pruned.

Backward elimination after forward selection (Marill and Green, "On the effectiveness of receptors in recognition systems",
1963), with the figures and weights of the look-ahead; but here a fall of the clean loss counts too.
"""

import numpy as np

from backdoor_gym.session import RepairSession
from backdoor_gym.session.session import Worth

from .look_ahead import LookAhead

#: Fall of the suspected danger over a repair below which it does not tell which prunes were good.
LEAST_FALL = 0.1


def restore(session: RepairSession, look: LookAhead, worth: Worth | None = None) -> float:
    """Give back the pruned units of a finished repair that are not worth it any more; what that is worth.

    The units that the suspected danger needs least come first. A unit is given back where the accuracy budget holds and
    loss_weight * (fall of the clean cross-entropy) - danger_weight * (rise of the suspected danger) + restore > 0.
    """
    total = 0.0
    if session.initial_figures.suspected_danger - session.figures.suspected_danger < LEAST_FALL:
        return total
    units = np.flatnonzero(session.state.pruned)
    dangers = [session.peek_danger([], restored=[int(unit)]) for unit in units]
    for unit in units[np.argsort(dangers, kind="stable")]:
        now, clean = session.figures, session.peek_clean([], restored=[int(unit)])
        if clean is None:
            continue
        rise = session.peek_danger([], restored=[int(unit)]) - now.suspected_danger
        if look.loss_weight * (now.loss - clean[1]) - look.danger_weight * rise + look.restore > 0:
            total += session.restore(int(unit), worth)
    return total
