"""Greedy search on accuracy: again and again the neuron whose prune costs the clean images least.

What a defender would do who knows of no rule: it removes what clean images do not need, in the hope that the backdoor
is among it. An exhaustive step costs one evaluation a neuron, so only the neurons are looked at whose prune promises to
cost least to first order.
"""

from typing import Any

import numpy as np

from backdoor_gym.arguments import check_whole
from backdoor_gym.envs.observation import NODE_FEATURES

from .policy import Observation, Policy, ask, check_env, stop_action

_HARM = NODE_FEATURES.index("harm_now")


class GreedyACC(Policy):
    """Prune the candidate that leaves the most accuracy, of equals the one that leaves the least cross-entropy.

    It stops where every candidate would break the accuracy budget of the environment, or where all are pruned.

    Args:
        env: the environment it acts in.
        candidates: units that are looked at in a step, those of the least first-order rise of the clean loss.
    """

    def __init__(self, env: Any, candidates: int = 60) -> None:
        check_whole("candidates", candidates, 1)
        self.candidates = candidates
        self._env = env

    def act(self, observation: Observation, environment: int) -> int:
        harm = observation["nodes"][: int(observation["num_nodes"][0]), _HARM]
        legal = np.flatnonzero(observation["action_mask"][: len(harm)])
        options = []
        check_env(self, self._env, environment, observation)
        for unit in legal[np.argsort(harm[legal], kind="stable")[: self.candidates]]:
            clean = ask(self._env, environment, "clean_also", [int(unit)])
            if clean is not None:
                options.append((-clean[0], clean[1], int(unit)))
        return min(options)[2] if options else stop_action(observation)
