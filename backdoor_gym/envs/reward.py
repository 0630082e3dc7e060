"""Rewards: what a prune is worth.

Both built-in rewards charge accuracy at the same rate: a loss of five points takes away all that pruning can earn.
Stopping earns nothing, so doing nothing scores 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, UnknownNameError
from ..graph.features import STATIC_FEATURES
from .victim import Figures, Victim

#: Reward lost with each unit of accuracy.
ACCURACY_WEIGHT = 20.0
#: Standardised score from which on a neuron counts as suspicious.
SUSPICION_THRESHOLD = 2.0


@dataclass(frozen=True)
class Transition:
    """An accepted prune.

    Attributes:
        victim: the model it happened in.
        unit: what was pruned.
        before: figures before the prune.
        after: figures after it.
    """

    victim: Victim
    unit: int
    before: Figures
    after: Figures


Reward = Callable[[Transition], float]


def suspicion(victim: Victim) -> np.ndarray:
    """How suspicious each unit is without any knowledge of the trigger, float64 (units,), of sum 1 (or all zero).

    What the larger of its UCLC score and its score of BN-statistics divergence has above ``SUSPICION_THRESHOLD``.
    """
    columns = [STATIC_FEATURES.index(name) for name in ("uclc", "kl")]
    excess = np.maximum(victim.features[:, columns].astype(np.float64).max(axis=1) - SUSPICION_THRESHOLD, 0)
    total = excess.sum()
    return excess / total if total > 0 else excess


class AccuracyReward:
    """Suspicion of the pruned unit, minus what the prune costs in clean accuracy; a defender can compute it.

    An episode earns at most 1 by suspicion, and losing five points of accuracy costs 1.
    """

    def __init__(self) -> None:
        self._victim: Victim | None = None
        self._suspicion = np.zeros(0)

    def __call__(self, transition: Transition) -> float:
        if transition.victim is not self._victim:
            self._victim, self._suspicion = transition.victim, suspicion(transition.victim)
        lost = transition.before.acc - transition.after.acc
        return float(self._suspicion[transition.unit]) - ACCURACY_WEIGHT * lost


def oracle_reward(transition: Transition) -> float:
    """Fall of ``Figures.danger``, minus what the prune costs in clean accuracy: for models whose trigger is known.

    In a model without a backdoor only accuracy counts.

    Raises:
        DataError: the model says that it has a backdoor, but its trigger is not known.
    """
    before, after = transition.before, transition.after
    lost = ACCURACY_WEIGHT * (before.acc - after.acc)
    if before.danger is None or after.danger is None:
        if transition.victim.model.facts.get("attack") == "clean":
            return -lost
        raise DataError(
            f'reward="oracle" needs the trigger, the target and test images of {transition.victim.name}, '
            "and score_samples above 0"
        )
    return before.danger - after.danger - lost


def make_reward(reward: str | Reward) -> Reward:
    """A reward by name ("acc" or "oracle"), or the callable itself.

    Raises:
        UnknownNameError: no such reward.
    """
    if callable(reward):
        return reward
    if reward == "acc":
        return AccuracyReward()
    if reward == "oracle":
        return oracle_reward
    raise UnknownNameError("reward", reward, ("acc", "oracle"))
