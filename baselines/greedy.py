"""Greedy search on accuracy: again and again the neuron whose prune costs the clean images least."""

from typing import Any

import numpy as np

from backdoor_gym.arguments import check_whole
from backdoor_gym.envs.observation import NODE_FEATURES

from .policy import Observation, Policy, ask, check_env, stop_action

_HARM = NODE_FEATURES.index("harm_now")


class GreedyACC(Policy):
    """Prunes the candidate that leaves the most accuracy, of equals the one that leaves the least cross-entropy.

    It stops where every candidate would break the accuracy budget of the environment, or where all are pruned.

    Args:
        env: the environment it acts in.
        candidates: units that are tried in a step: those whose prune raises the clean loss least to first order.
    """

    def __init__(self, env: Any, candidates: int = 60) -> None:
        check_whole("candidates", candidates, 1)
        self.candidates = candidates
        self.env = env

    def act(self, observation: Observation, environment: int) -> int:
        harm = observation["nodes"][: int(observation["num_nodes"][0]), _HARM]
        legal = np.flatnonzero(observation["action_mask"][: len(harm)])
        check_env(self, self.env, environment, observation)
        options = []
        for unit in legal[np.argsort(harm[legal], kind="stable")[: self.candidates]]:
            clean = ask(self.env, environment, "clean_also", [int(unit)])
            if clean is not None:
                options.append((-clean[0], clean[1], int(unit)))
        return min(options)[2] if options else stop_action(observation)
