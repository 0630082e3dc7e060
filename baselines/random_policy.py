"""The floor: a legal action drawn uniformly."""

import numpy as np

from backdoor_gym.arguments import check_whole
from backdoor_gym.policies.contract import Observation, Policy


class RandomPolicy(Policy):
    """Prunes legal neurons at random, and stops as often as it would prune any one of them."""

    reads_derivatives = False

    def __init__(self, seed: int | None = None) -> None:
        check_whole("seed", seed, may_be_none=True)
        self._random = np.random.default_rng(seed)

    def act(self, observation: Observation, environment: int) -> int:
        return int(self._random.choice(np.flatnonzero(observation["action_mask"])))
