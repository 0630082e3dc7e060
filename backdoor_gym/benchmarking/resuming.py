"""The one engine that a measurement goes on with after it was killed: a file of JSON lines, and processes that append to it."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import DataError
from ..on_ray.cluster import ClusterPool
from ..processes import died, workers
from ..writing import as_json, locked, telling

Row = dict[str, Any]


@dataclass(frozen=True)
class LineFile:
    """A file of lines that several processes append to, whole or not at all.

    What stands behind the last newline is of a process that was killed: it is not read, and the next line takes its place.
    """

    path: Path
    #: How every line begins, so that no file of somebody else is taken for one of these.
    begins: ClassVar[bytes] = b"{"

    def append(self, line: str) -> None:
        """Add a line at once.

        Raises:
            DataError: the file is not of this kind.
            WriteError: the disk is full, say; the lines before it are kept.
        """
        with locked(self.path), telling(self.path), self.path.open("ab+", buffering=0) as file:
            file.seek(0)
            end = self._finished(file.read())
            file.truncate(end)
            try:
                left = memoryview(f"{line}\n".encode())
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def lines(self) -> list[bytes]:
        """All finished lines.

        Raises:
            DataError: the file is not of this kind.
        """
        with locked(self.path):
            text = self.path.read_bytes() if self.path.is_file() else b""
        return [line for line in text[: self._finished(text)].splitlines() if line.strip()]

    def _finished(self, text: bytes) -> int:
        """How much of the text is finished lines."""
        end = text.rfind(b"\n") + 1
        if text and not end and not text.startswith(self.begins):
            raise DataError(f"{self.path} is not of a benchmark")
        return end


@dataclass(frozen=True)
class RowFile(LineFile):
    """Rows of a measurement, one JSON object a line; ``key`` are the fields that tell them apart."""

    key: tuple[str, ...]

    def add(self, **row: Any) -> None:
        """Append a row."""
        self.append(as_json(row))

    def rows(self) -> list[Row]:
        """All rows."""
        return [json.loads(line) for line in self.lines()]

    def missing(self, tasks: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The tasks, named by their keys, that have no row yet."""
        done = {tuple(row[field] for field in self.key) for row in self.rows()}
        return [task for task in tasks if task not in done]


def run_tasks(
    run: Callable[..., None],
    tasks: Sequence[tuple[Any, ...]],
    file: LineFile,
    jobs: int = 1,
    ray: str | None = None,
    progress: bool = False,
    sizes: Sequence[int] | None = None,
) -> None:
    """Call ``run(*task, file)`` for each task, which appends to the file, in ``jobs`` processes of one core or on a Ray cluster.

    With one job it is this process, on one core. ``sizes`` are how far each task moves the bar, 1 by default.

    Raises:
        DataError: a process died, or there is no cluster.
    """
    sizes = [1] * len(tasks) if sizes is None else sizes
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        shown = bar.add_task("benchmark", total=sum(sizes))
        if jobs == 1 and ray is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in the processes: seconds of both stand in one table
            try:
                for task, size in zip(tasks, sizes, strict=True):
                    run(*task, file)
                    bar.advance(shown, size)
            finally:
                torch.set_num_threads(threads)
            return
        with workers(jobs, ray) as pool:
            store = pool.keeper(file) if isinstance(pool, ClusterPool) else file
            waiting = {pool.submit(run, *task, store): size for task, size in zip(tasks, sizes, strict=True)}
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.advance(shown, waiting[done])
            except Exception as error:
                if not died(error):
                    raise
                raise DataError(
                    'a process died (out of memory, or a script without `if __name__ == "__main__":`?); call again, with '
                    f"fewer jobs: finished cells are kept ({type(error).__name__})"
                ) from error
