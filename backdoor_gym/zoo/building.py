"""Making many models of the procedural family at once, over processes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool

from ..processes import one_core_each
from . import family


def build(names: Sequence[str], jobs: int) -> Iterator[tuple[str, str]]:
    """Put models into the cache; yields each name when it is there, with "" or what went wrong.

    One that fails does not stop the others, and what is in the cache already is not made again.

    Args:
        names: of models of the family.
        jobs: number of processes, each of which computes on one core.
    """
    pool = one_core_each(jobs)
    try:
        waiting = {pool.submit(_build_one, name): name for name in names}
        for done in as_completed(waiting):
            try:
                yield waiting[done], done.result()
            except BrokenProcessPool:
                yield waiting[done], "its process died (out of memory?); call again with fewer processes"
    finally:
        pool.shutdown(cancel_futures=True)


def _build_one(name: str) -> str:
    try:
        family.load(name)
    except Exception as error:  # whatever went wrong with one, the others go on
        return str(error) or type(error).__name__
    return ""
