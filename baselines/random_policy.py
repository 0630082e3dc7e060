"""The floor: a legal action drawn uniformly."""

import numpy as np

from backdoor_gym.arguments import check_whole
from backdoor_gym.policies.contract import Observation, Policy


class RandomPolicy(Policy):
    """Prunes legal neurons at random, and stops as often as it would prune any one of them.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import RandomPolicy
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = RandomPolicy(seed=0).predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer4.1.conv1[39]'
    """

    reads_derivatives = False

    def __init__(self, seed: int | None = None) -> None:
        check_whole("seed", seed, may_be_none=True)
        self._random = np.random.default_rng(seed)

    def act(self, observation: Observation, environment: int) -> int:
        return int(self._random.choice(np.flatnonzero(observation["action_mask"])))
