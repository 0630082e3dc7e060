"""Errors a user can cause, one class a kind; each message says what was wrong and what is allowed."""

from collections.abc import Iterable
from difflib import get_close_matches


class BackdoorGymError(Exception):
    """Base of every error this package raises on purpose."""


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

    def __init__(self, kind: str, name: str, allowed: Iterable[str], hint: str = "") -> None:
        allowed = sorted(allowed)
        near = get_close_matches(str(name), allowed, n=3, cutoff=0.5)
        shown = allowed if len(allowed) <= 12 else [*allowed[:12], "..."]
        suggestion = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
        choices = f"known: {', '.join(shown)}"
        parts = [f"unknown {kind} {name!r}", suggestion or choices, hint]
        super().__init__("; ".join(part for part in parts if part))


class WriteError(BackdoorGymError, OSError):
    """Something cannot be written, such as to a full disk or a read-only folder; the files that were there are unharmed."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"
