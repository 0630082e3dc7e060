"""Environments that begin what they are about to be asked for, all at once, in threads of one core each."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any

import gymnasium as gym
import torch

from ..session import RepairSession

#: Bytes of all activations of a pass up to which environments step side by side. A larger network leaves no core idle when
#: its operations are divided, and several of them at once drive each other out of the processor's cache.
SIDE_BY_SIDE_BYTES = 128 << 20


def core_threads() -> ThreadPoolExecutor:
    """As many threads as torch computes with now; in each of them it computes with one."""
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "sub-environment")
    all_here = Barrier(count)

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch takes note of a thread at its first question, not when it sets the number
        all_here.wait()  # so that each thread begins once

    list(pool.map(begin, range(count)))
    torch.set_num_threads(count)  # a thread sets its own number, but also that of threads which are yet to come
    return pool


class Prefetch(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose next step, or reset, a thread may have begun: it is then waited for, not done again.

    Args:
        env: the environment.
        threads: where it works.
    """

    def __init__(self, env: gym.Env[Any, Any], threads: ThreadPoolExecutor) -> None:
        super().__init__(env)
        self._threads = threads
        self._begun: Future[list[Any]] | None = None

    @property
    def is_light(self) -> bool:
        """Whether what it is asked for is better computed on one core, beside others, than on all of them."""
        try:
            session: RepairSession = self.get_wrapper_attr("session")
        except gym.error.ResetNeeded:  # there is nothing to compute yet
            return True
        return session.pass_bytes <= SIDE_BY_SIDE_BYTES

    def begin_step(self, action: Any, reset_after: bool = False) -> None:
        """Begin this step, and the reset after it where it ends the episode."""
        self._begun = self._threads.submit(self._step, action, reset_after)

    def begin_reset(self) -> None:
        """Begin a reset without seed and options."""
        self._begun = self._threads.submit(lambda: [self.env.reset()])

    def abandon(self) -> None:
        """Wait for what was begun and never asked for, and forget it."""
        if self._begun is not None:
            self._begun.exception()
            self._begun = None

    def step(self, action: Any) -> Any:
        return self.env.step(action) if self._begun is None else self._wait()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset(seed=seed, options=options) if self._begun is None else self._wait()

    def _step(self, action: Any, reset_after: bool) -> list[Any]:
        """What is asked for next, the last thing first."""
        stepped = self.env.step(action)
        return [self.env.reset(), stepped] if reset_after and (stepped[2] or stepped[3]) else [stepped]

    def _wait(self) -> Any:
        assert self._begun is not None
        results = self._begun.result()
        result = results.pop()
        if not results:
            self._begun = None
        return result


def side_by_side(envs: Iterable[Prefetch]) -> bool:
    """Whether these are to step at once, on one core each, instead of one after the other on all cores."""
    return all(env.is_light for env in envs)


def maker(env: Prefetch) -> Callable[[], Prefetch]:
    """What vector environments are made with: gives this environment."""
    return lambda: env
