"""Errors a user can cause, one class a kind; each message says what was wrong and what is allowed."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from .wording import MOST_SHOWN, cut, one_line, shown

#: Names among which the nearest are sought, and shown ones: looking for them takes time.
MOST_COMPARED, MOST_NAMED = 500, 12


class BackdoorGymError(Exception):
    """Base of every error this package raises on purpose.

    What it says is one line, of a bearable length, in characters that can be shown: much of it comes out of files.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ModelFileError(BackdoorGymError, ValueError):
    """A file cannot be read as an infected model: missing, damaged, or of a kind that is never opened."""


class WeightsError(BackdoorGymError, ValueError):
    """Weights do not fit the architecture they are said to belong to, or are not finite."""


class DataError(BackdoorGymError, ValueError):
    """Images or labels of a wrong shape, dtype or range, or a data set that cannot be read."""


class UntraceableError(BackdoorGymError, ValueError):
    """A network whose neurons cannot be found; the message names the layer and what to change."""


class CompactionError(BackdoorGymError, RuntimeError):
    """Channels cannot be cut out of this network without changing its outputs."""


class TrainingError(BackdoorGymError, RuntimeError):
    """An infected model that could not be made as asked (too low accuracy or attack success)."""


class UnknownNameError(BackdoorGymError, ValueError):
    """A name that is not in the list of allowed ones; the nearest ones are suggested."""

    def __init__(self, kind: str, name: Any, allowed: Iterable[str], hint: str = "") -> None:
        names = sorted(map(str, allowed))
        near = _nearest(name, names)
        listed = [cut(known) for known in names[:MOST_NAMED]] + ["..."] * (len(names) > MOST_NAMED)
        suggestion = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
        choices = f"known: {', '.join(listed)}"
        what = f"unknown {kind} {shown(name)}"
        if not isinstance(name, str):
            what = f"{what} (a name is a text, and not of the type {type(name).__name__})"
        super().__init__("; ".join(part for part in (what, suggestion or choices, hint) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args)  # another process makes it of its message, not of a name


def check_name(kind: str, name: Any, allowed: Iterable[str], hint: str = "") -> None:
    """Raise ``UnknownNameError`` unless it is one of the allowed names; whatever it is."""
    if not isinstance(name, str) or name not in allowed:
        raise UnknownNameError(kind, name, allowed, hint)


def _nearest(name: Any, names: list[str]) -> list[str]:
    """The allowed names that are most like it."""
    if not isinstance(name, str) or len(name) > MOST_SHOWN:
        return []
    compared = [known for known in names[:MOST_COMPARED] if len(known) <= MOST_SHOWN]
    return get_close_matches(name, compared, n=3, cutoff=0.5)


def _again(kind: type[Exception], arguments: tuple[Any, ...]) -> Exception:
    error = kind.__new__(kind)
    error.args = arguments
    return error


class WriteError(BackdoorGymError, OSError):
    """Something cannot be written, such as to a full disk or a read-only folder; the files that were there are unharmed."""

    def __str__(self) -> str:
        return one_line(f"{self.filename} cannot be written: {self.strerror}")
