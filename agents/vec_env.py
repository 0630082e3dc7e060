"""Sub-environments of Stable-Baselines3 that work at the same time."""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from backdoor_gym.envs.prefetch import Prefetch, core_threads, maker, side_by_side


class Recorded(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose episode can be played again.

    Attributes:
        episode: "seed" it was reset with or None, "random" numbers that it was drawn with else, and "actions"; JSON-able.
            None for an episode that was begun with options, which may be no plain data.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episode: dict[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        random = None if seed is not None else self.unwrapped.np_random.bit_generator.state
        self.episode = None if options else {"seed": seed, "random": random, "actions": []}
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        if self.episode is not None:
            self.episode["actions"].append(int(action))
        return self.env.step(action)

    def play(self, episode: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Play an episode again: the last observation, and the info of the reset."""
        if episode["random"] is not None:
            self.unwrapped.np_random.bit_generator.state = episode["random"]
        observation, info = self.reset(seed=episode["seed"])
        for action in episode["actions"]:
            observation = self.step(action)[0]
        return observation, info


class ThreadedVecEnv(DummyVecEnv):
    """``DummyVecEnv`` whose sub-environments step at once, on one core each, where those of ``make_vec`` do.

    Args:
        makers: of the environments.
    """

    def __init__(self, makers: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        self._threads = core_threads()
        self._recorded = [Recorded(make()) for make in makers]
        self._prefetched = [Prefetch(env, self._threads) for env in self._recorded]
        super().__init__([maker(env) for env in self._prefetched])

    def episodes(self) -> list[dict[str, Any] | None]:
        """The episodes of all sub-environments so far, for ``play``."""
        episodes = [env.episode for env in self._recorded]
        return [episode and {**episode, "actions": list(episode["actions"])} for episode in episodes]

    def play(self, episodes: Mapping[int, Mapping[str, Any]]) -> Any:
        """Play these episodes again in the sub-environments of these numbers; the last observations of all."""
        for index, episode in episodes.items():
            observation, self.reset_infos[index] = self._recorded[index].play(episode)
            self._save_obs(index, observation)
        return self._obs_from_buf()

    def first_steps(self) -> np.ndarray:
        """Of each sub-environment, whether its episode has just begun."""
        return np.array([env.episode is None or not env.episode["actions"] for env in self._recorded])

    def step_async(self, actions: np.ndarray) -> None:
        """Begin the step of each sub-environment, and the reset of those that it ends."""
        super().step_async(actions)
        if side_by_side(self._prefetched):
            for env, action in zip(self._prefetched, self.actions, strict=True):
                env.begin_step(action, reset_after=True)

    def step_wait(self) -> Any:
        """What came of it."""
        try:
            return super().step_wait()
        finally:
            for env in self._prefetched:
                env.abandon()

    def close(self) -> None:
        """Close the sub-environments and end the threads."""
        super().close()
        self._threads.shutdown()
