"""What commands share: options, and one place that decides what is printed where."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from ..errors import DataError
from ..progress import Watch, watched
from ..wording import printable
from ..writing import as_json, check_place, made, sweep, telling

# Names out of files are shown as they are: nothing in them is markup.
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)

#: What messages call it.
OUTPUT = "standard output"

DEFAULT_MODEL = "digits-badnets"

ModelArgument = Annotated[str, typer.Argument(help="Name (see list) or file of an infected model.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Hub id or folder to read the images from, instead of the one the model names."),
]
ResidualOption = Annotated[
    str,
    typer.Option(
        "--residual", help='"channel" prunes each neuron alone, "group" those that share a residual sum together.'
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the network runs: cpu, cuda, ...")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", help='Ray cluster that does the work: HOST:PORT, "auto", or "local". Needs the extra "ray".'),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and what --json asks for).")
]


@dataclass(frozen=True)
class Output:
    """What a command says: its result on standard output, as text or as JSON; how it goes on standard error."""

    json: bool
    quiet: bool

    @property
    def bars(self) -> bool:
        """Whether progress is shown."""
        return not self.quiet

    @contextmanager
    def working(self, what: str | None = None) -> Iterator[Watch]:
        """While the work goes on, what libraries print does not reach standard output; gives what draws its progress.

        Args:
            what: the work in words, or None where it shows its own progress.
        """
        printed, spare = sys.stdout, None
        if self.quiet:
            spare = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
        sys.stdout = spare or sys.stderr
        try:
            with warnings.catch_warnings(), watched(what, what is not None and not self.quiet) as watch:
                if self.quiet:
                    warnings.simplefilter("ignore")
                warnings.showwarning = self._show(warnings.showwarning)  # catch_warnings puts the old one back
                yield watch
        finally:
            sys.stdout = printed
            if spare is not None:
                spare.close()

    def _show(self, otherwise: Callable[..., None]) -> Callable[..., None]:
        """What shows warnings: those for users as notes, without the place in the code."""

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if category is UserWarning:
                self.note(f"Note: {message}")
            else:
                otherwise(message, category, *rest, **more)

        return show

    def note(self, line: str) -> None:
        """How the work goes: a line on standard error; where nobody can read it, the work goes on."""
        if not self.quiet:
            with suppress(OSError):
                errors.print(printable(line), soft_wrap=True)

    def say(self, what: RenderableType, **style: Any) -> None:
        """A part of the result, for people."""
        if not (self.json or self.quiet):
            what = printable(what) if isinstance(what, str) else what
            with telling(OUTPUT):
                console.print(what, **{"soft_wrap": True, **style})

    def result(self, facts: Any) -> None:
        """The whole result, for programs."""
        if self.json:
            with telling(OUTPUT):
                print(as_json(facts), flush=True)


def check_writable(*files: Path) -> None:
    """Find out before the work, not after it, that results cannot be written; remove what killed runs left beside them.

    Raises:
        WriteError: the folder of a file is not there and cannot be made, or is read-only; or there is something in the place
            of the file that is not to be replaced.
    """
    for folder in dict.fromkeys(file.parent for file in files):
        with telling(f"the folder {folder}"), made(folder, keep=False):  # work that fails leaves none behind
            TemporaryFile(dir=folder).close()  # permissions alone do not tell: the superuser has them all
            sweep(folder)
    for file in files:
        check_place(file)


def as_place(text: str | Path) -> Path:
    """Where an option says to write; not the working folder, which ``Path("")`` would be."""
    if not str(text):
        raise typer.BadParameter("it is empty, and names no place to write to")
    return Path(text)


def pairs(options: list[str] | None, flag: str) -> dict[str, Any]:
    """KEY=VALUE options; values are read as JSON where they are that, and as text otherwise."""
    parsed = {}
    for option in options or []:
        key, sign, value = option.partition("=")
        if not sign or not key:
            raise DataError(f"{flag} takes KEY=VALUE, not {option!r}")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed
