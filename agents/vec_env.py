"""Sub-environments of Stable-Baselines3 that work at the same time."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from backdoor_gym.envs.ahead import Ahead, core_threads, maker, side_by_side


class ThreadedVecEnv(DummyVecEnv):
    """``DummyVecEnv`` whose sub-environments step at once, on one core each, where those of ``make_vec`` do.

    Args:
        makers: of the environments.
    """

    def __init__(self, makers: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        self._threads = core_threads()
        self._ahead = [Ahead(make(), self._threads) for make in makers]
        super().__init__([maker(env) for env in self._ahead])

    def step_async(self, actions: np.ndarray) -> None:
        """Begin the step of each sub-environment, and the reset of those that it ends."""
        super().step_async(actions)
        begun = zip(self._ahead, self.actions, strict=True) if side_by_side(self._ahead) else ()
        for env, action in begun:
            env.begin_step(action, reset_after=True)

    def step_wait(self) -> Any:
        """What came of it."""
        try:
            return super().step_wait()
        finally:
            for env in self._ahead:
                env.abandon()

    def close(self) -> None:
        """Close the sub-environments and end the threads."""
        super().close()
        self._threads.shutdown()
