"""Giving back what a repair need not have pruned.

Backward elimination after forward selection (Marill and Green, "On the effectiveness of receptors in recognition systems",
1963), with the figures and weights of the look-ahead; but here a fall of the clean loss counts too.
"""

import numpy as np

from backdoor_gym.envs.prune import BackdoorPruneEnv

from .look_ahead import LookAhead

#: Fall of the suspected danger over a repair below which it does not tell which prunes were good.
LEAST_FALL = 0.1


def restore(env: BackdoorPruneEnv, look: LookAhead) -> float:
    """Give back the pruned units of a finished repair that are not worth it any more; the reward of it.

    The units that the suspected danger needs least come first. A unit is given back where the accuracy budget holds and
    loss_weight * (fall of the clean cross-entropy) - danger_weight * (rise of the suspected danger) + restore > 0.
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
