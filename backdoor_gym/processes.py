"""Work that is spread over processes, of this machine or of a cluster."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch


def one_core_each(jobs: int) -> ProcessPoolExecutor:
    """So many processes, each of which computes on one core, and ends when the process that began them does.

    They are spawned: forked ones would inherit torch's threads in an unusable state.
    """
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin)


@contextmanager
def workers(jobs: int, ray: str | None = None) -> Iterator[Executor]:
    """So many processes of this machine, or the Ray cluster at that address; what has not begun is dropped in the end.

    Raises:
        DataError: Ray is not installed, or there is no cluster at that address.
    """
    if ray is not None:
        from .on_ray.cluster import cluster

        with cluster(ray) as machines:
            yield machines
        return
    pool = one_core_each(jobs)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def died(error: Exception) -> bool:
    """Whether an error says that the process of a task died, rather than what the task did."""
    return isinstance(error, BrokenProcessPool) or type(error).__module__.startswith("ray.")


def counter() -> Any:
    """A whole number as ``value``, -1 at first, that a process of ``end_of_process`` shares with this one."""
    return get_context("spawn").Value("q", -1)


def end_of_process(work: Callable[[], None]) -> str | None:
    """Do work in a process of its own; None, or what that process died of, in words."""
    process = get_context("spawn").Process(target=_work, args=(work,))
    process.start()
    process.join()
    code = process.exitcode or 0
    if code >= 0:
        return f"it ended with exit code {code}" if code else None
    names = {known.value: known.name for known in signal.Signals}
    hints = {"SIGKILL": ", as the system does where memory runs out", "SIGSEGV": ", a fault in native code"}
    name = names.get(-code, f"signal {-code}")
    return f"it was ended by {name}{hints.get(name, '')}"


def _work(work: Callable[[], None]) -> None:
    _begin()
    work()


def _begin() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent tells its processes nothing: they would work on, for nobody."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
