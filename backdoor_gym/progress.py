"""Progress of long work, shown on standard error so that results can be piped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, track

#: Called with what is being done, how much of it is done, and of how much (None where that is not known).
Watch = Callable[[str, int, int | None], None]

Item = TypeVar("Item")


def bar(items: Iterable[Item], what: str, total: int, shown: bool) -> Iterator[Item]:
    """The items, with a bar while they are taken."""
    yield from track(items, what, total, console=Console(stderr=True), transient=True, disable=not shown)


@contextmanager
def watched(what: str | None, shown: bool) -> Iterator[Watch]:
    """Gives a ``Watch`` that draws a bar with a clock, begun with ``what``; on a terminal alone."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        tasks: dict[str, TaskID] = {}

        def watch(now: str, done: int, whole: int | None) -> None:
            if now not in tasks:
                for name in list(tasks):
                    progress.remove_task(tasks.pop(name))
                tasks[now] = progress.add_task(now, total=whole, count="")
            progress.update(
                tasks[now], completed=done, count=f"{done}" + (f"/{whole}" if whole else "") if done else ""
            )

        if what is not None:
            watch(what, 0, None)
        yield watch
