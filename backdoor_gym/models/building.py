"""Making many models of the procedural family at once, over processes or machines."""

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed

from ..errors import WriteError
from ..processes import died, workers
from ..writing import sweep
from . import family


def build(names: Sequence[str], jobs: int, ray: str | None = None) -> Iterator[tuple[str, str]]:
    """Put models into the cache that are not there; yields each name when it is, with "" or what went wrong.

    Args:
        names: of models of the family.
        jobs: number of processes, each of which computes on one core.
        ray: address of a Ray cluster that makes them instead; they come to the cache of this machine.

    Raises:
        DataError: Ray is not installed, or there is no cluster at that address.
        WriteError: the cache cannot be written, which no other model would find better.
    """
    for folder in {family.cache_path(name).parent for name in names}:
        sweep(folder)
    missing = [name for name in names if not (ray and family.cache_path(name).is_file())]
    yield from ((name, "") for name in names if name not in missing)
    with workers(jobs, ray) as pool:
        waiting = {pool.submit(_make, name, ray is not None): name for name in missing}
        for done in as_completed(waiting):
            try:
                problem, content = done.result()
            except Exception as error:
                if not died(error):
                    raise
                problem, content = "its process died (out of memory?); call again with fewer processes", None
            if content is not None:
                family.keep(waiting[done], content)
            yield waiting[done], problem


def _make(name: str, send: bool) -> tuple[str, bytes | None]:
    """What went wrong, and the file if it is to be sent."""
    try:
        family.load(name)
    except WriteError:
        raise
    except Exception as error:  # whatever went wrong with one, the others go on
        return str(error) or type(error).__name__, None
    return "", family.cache_path(name).read_bytes() if send else None
