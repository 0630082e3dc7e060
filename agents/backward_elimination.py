"""Giving back what a repair need not have pruned: what one prune was made for, later ones may have done as well.

Backward elimination after forward selection (Marill and Green, "On the effectiveness of receptors in recognition systems",
1963), with the figures and weights of the look-ahead; but a fall of the clean loss counts here, for that is what it is for.
"""

import numpy as np

from backdoor_gym.envs.prune import BackdoorPruneEnv

from .look_ahead import LookAhead

#: Fall of the suspected danger over a repair below which it says nothing of what each prune was good for.
LEAST_FALL = 0.1


def restore(env: BackdoorPruneEnv, look: LookAhead) -> float:
    """Give back the pruned neurons of a finished repair that are not worth it any more.

    One after the other, those that the suspected danger needs least first: one is given back where
    loss_weight * (fall of the clean cross-entropy) - danger_weight * (rise of the suspected danger) + restore is above 0 and
    the accuracy budget holds. Where the suspected danger did not fall, nothing is: by these figures the whole repair was
    for nothing, and they may be wrong. The reward is returned.
    """
    masked, reward = env.masked_victim, 0.0
    if env.initial_figures.suspected_danger - env.figures.suspected_danger < LEAST_FALL:
        return reward
    units = np.flatnonzero(env.pruned)
    dangers = [masked.suspected_danger(_without(env.pruned, unit)) for unit in units]
    for unit in units[np.argsort(dangers, kind="stable")]:
        now, left = env.figures, _without(env.pruned, unit)
        clean = masked.clean(left, env.least_acc)
        if clean is None:
            continue
        rise = masked.suspected_danger(left) - now.suspected_danger
        if look.loss_weight * (now.loss - clean[1]) - look.danger_weight * rise + look.restore > 0:
            reward += env.give_back(int(unit))
    return reward


def _without(pruned: np.ndarray, unit: np.integer) -> np.ndarray:
    left = pruned.copy()
    left[unit] = False
    return left
