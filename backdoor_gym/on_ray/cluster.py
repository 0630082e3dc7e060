"""Work that is spread over the machines of a Ray cluster (https://docs.ray.io), as an ordinary executor.

Ray is an extra, ``pip install 'backdoor-gym[ray]'``; nothing but this file and ``on_ray/rllib.py`` imports it.
"""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from ..errors import DataError

#: How often a task is begun again because the machine it ran on is gone.
RETRIES = 5


class ClusterPool(Executor):
    """Tasks of one core each, on whichever machine has one free; begun again where a machine dies.

    Functions, arguments and results have to be picklable, and the machines must have this package.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._call = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        self._waiting: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin a task as soon as a core is free."""
        reference, future = self._call.remote(fn, args, kwargs), Future[Any]()
        self._waiting[future] = reference
        reference.future().add_done_callback(lambda done: self._settle(future, done))
        return future

    def _settle(self, future: Future[Any], done: Future[Any]) -> None:
        self._waiting.pop(future, None)
        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        else:  # of what the task itself raised Ray makes an error of its own
            future.set_exception(getattr(error, "cause", None) or error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for what was begun, or give it up."""
        for future, reference in list(self._waiting.items()):
            if cancel_futures:
                self._ray.cancel(reference, force=True)
            elif wait:
                future.exception()

    def keeper(self, thing: Any) -> "Kept":
        """An object that stays on this machine, whose methods tasks on other machines may call."""
        here = self._ray.get_runtime_context().get_node_id()
        placed = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        actor = self._ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=placed).remote(thing)
        return Kept(actor)


class Kept:
    """An object on another machine: its methods are called there, and waited for."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *arguments: _ray().get(self._actor.call.remote(method, arguments))


@contextmanager
def cluster(address: str) -> Iterator[ClusterPool]:
    """Connect to a Ray cluster, and part from it in the end.

    Args:
        address: HOST:PORT of its head, "auto" for the one of this machine, or "local" to begin one on this machine alone.

    Raises:
        DataError: Ray is not installed, or there is no cluster at that address.
    """
    ray = _ray()
    mine = not ray.is_initialized()
    if mine:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"there is no Ray cluster at {address!r} ({str(error).splitlines()[0]})") from error
    pool = ClusterPool(ray)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if mine:
            ray.shutdown()


def check_ray() -> None:
    """Find out before the work.

    Raises:
        DataError: Ray is not installed.
    """
    _ray()


def _knock(address: str) -> None:
    """Ray itself would go on asking for many minutes.

    Raises:
        OSError: nobody answers there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise DataError(
            "Ray is not installed: pip install 'backdoor-gym[ray]' (RLlib needs the Gymnasium of its own release, so best in "
            "an environment of its own)"
        ) from error
    return ray


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    return function(*arguments, **options)


class _Keeper:
    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._thing, method)(*arguments)
