"""Rewards: what a prune is worth.

Both built-in rewards are the fall of a danger in [0, 1] (see ``metrics.danger``) minus the same price of accuracy, twice
that of the DER: within an accuracy budget accuracy is to be spent where it buys something. Stopping earns nothing, so doing
nothing scores 0.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import DataError, check_name
from ..session.session import Transition
from ..wording import shown

#: Reward lost with each unit of accuracy.
ACCURACY_WEIGHT = 2.0
#: Reward lost with each neuron that is pruned from a network known to be clean.
CLEAN_PRUNE_COST = 0.05


Reward = Callable[[Transition], float]


def accuracy_reward(transition: Transition) -> float:
    """Fall of the suspected danger minus what the prune costs in clean accuracy: no trigger is needed.

    The suspected danger is that of the inverted trigger (``backdoor_gym.analysis.trigger_inversion``).
    """
    before, after = transition.before, transition.after
    return before.suspected_danger - after.suspected_danger - ACCURACY_WEIGHT * (before.acc - after.acc)


def oracle_reward(transition: Transition) -> float:
    """Fall of ``Figures.danger``, minus what the prune costs in accuracy: for models whose trigger is known.

    The accuracy is that on test images where there are any. The accuracy budget keeps the loss on the defender's few
    clean images small; it is those that nothing was fitted to which tell what a repair has cost.
    In a model without a backdoor each prune costs ``CLEAN_PRUNE_COST`` besides.

    Raises:
        DataError: the model says that it has a backdoor, but its trigger is not known.
    """
    before, after = transition.before, transition.after
    if before.test_acc is None or after.test_acc is None:
        lost = ACCURACY_WEIGHT * (before.acc - after.acc)
    else:
        lost = ACCURACY_WEIGHT * (before.test_acc - after.test_acc)
    if before.danger is None or after.danger is None:
        if transition.prepared.model.facts.get("attack") == "clean":
            return -CLEAN_PRUNE_COST - lost
        raise DataError(
            f'reward="oracle" needs the trigger, the target and test images of {transition.prepared.name}, '
            "and score_samples above 0"
        )
    return before.danger - after.danger - lost


REWARDS: dict[str, Reward] = {"acc": accuracy_reward, "oracle": oracle_reward}


def make_reward(reward: str | Reward) -> Reward:
    """A reward by name ("acc" or "oracle"), or the callable itself; a number that is not finite raises ``DataError``.

    Raises:
        UnknownNameError: no such reward.
    """
    if not callable(reward):
        check_name("reward", reward, REWARDS)
        reward = REWARDS[reward]
    return partial(_finite, reward)


def _finite(reward: Reward, transition: Transition) -> float:
    value: Any = reward(transition)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"a reward must be a finite number, not {shown(value)}")
    return number
