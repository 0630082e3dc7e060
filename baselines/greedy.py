"""Greedy search on accuracy: again and again the neuron whose prune costs the clean images least."""

from functools import partial
from typing import Any

import numpy as np

from backdoor_gym.arguments import check_whole
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.policies.contract import Observation, Policy, ask, check_env, stop_action
from backdoor_gym.session import RepairSession

_HARM = NODE_FEATURES.index("harm_now")


class GreedyACC(Policy):
    """Prunes the candidate that leaves the most accuracy, of equals the one that leaves the least cross-entropy.

    It stops where every candidate would break the accuracy budget of the environment, or where all are pruned.

    Args:
        env: the environment it acts in.
        candidates: units that are tried in a step: those whose prune raises the clean loss least to first order.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import GreedyACC
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = GreedyACC(env, candidates=3).predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer3.0.conv1[17]'
    """

    def __init__(self, env: Any, candidates: int = 60) -> None:
        check_whole("candidates", candidates, 1)
        self.candidates = candidates
        self.set_env(env)

    def act(self, observation: Observation, environment: int) -> int:
        harm = observation["nodes"][: int(observation["num_nodes"][0]), _HARM]
        legal = np.flatnonzero(observation["action_mask"][: len(harm)])
        check_env(self, self.env, environment, observation)
        units = legal[np.argsort(harm[legal], kind="stable")[: self.candidates]]
        best: int | None = ask(self.env, environment, "consult", partial(_best_of, units))
        return stop_action(observation) if best is None else best


def _best_of(units: np.ndarray, session: RepairSession) -> int | None:
    """Of these units the one that leaves the most accuracy; None where each breaks the budget."""
    left = [(clean, int(unit)) for unit in units if (clean := session.peek_clean([int(unit)])) is not None]
    return min((-acc, loss, unit) for (acc, loss), unit in left)[2] if left else None
