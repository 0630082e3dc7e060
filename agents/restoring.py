"""Giving back what a repair need not have pruned: what one prune was made for, later ones may have done as well.

Backward elimination after forward selection (Marill and Green, "On the effectiveness of receptors in recognition systems",
1963), with the figures and weights of the look-ahead; but a fall of the clean loss counts here, for that is what it is for.
"""

import numpy as np

from backdoor_gym.envs.prune import BackdoorPruneEnv

from .look_ahead import LookAhead

#: Units whose return raises the suspected danger least; only for these are the clean images looked at, which takes longer.
CANDIDATES = 8
#: Fall of the suspected danger over a repair below which it says nothing of what each prune was good for.
LEAST_FALL = 0.1


def restore(env: BackdoorPruneEnv, look: LookAhead) -> float:
    """Give back, one at a time, the pruned neurons of a finished repair that are not worth it any more.

    What counts is loss_weight * (fall of the clean cross-entropy) - danger_weight * (rise of the suspected danger) + restore;
    while that is above 0 for any of the candidates, the one of the largest is given back. The accuracy budget holds here too.
    Where the suspected danger did not fall, nothing is: by these figures the whole repair was for nothing, and they may be
    wrong. The reward is returned.
    """
    masked, reward = env.masked_victim, 0.0
    if env.initial_figures.suspected_danger - env.figures.suspected_danger < LEAST_FALL:
        return reward
    while (units := np.flatnonzero(env.pruned)).size:
        now = env.figures
        left = [_without(env.pruned, unit) for unit in units]
        rises = np.array([masked.suspected_danger(one) for one in left]) - now.suspected_danger
        best, chosen = 0.0, None
        for index in np.argsort(rises, kind="stable")[:CANDIDATES]:
            figures = masked.figures(left[index], score=False)
            worth = look.loss_weight * (now.loss - figures.loss) - look.danger_weight * rises[index] + look.restore
            if worth > best and not env.breaks_budget(figures):
                best, chosen = worth, int(units[index])
        if chosen is None:
            break
        reward += env.give_back(chosen)
    return reward


def _without(pruned: np.ndarray, unit: np.integer) -> np.ndarray:
    left = pruned.copy()
    left[unit] = False
    return left
