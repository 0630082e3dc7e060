"""The command line: ``backdoor-gym detect | repair | benchmark | train | infect | list | inspect | zoo build``.

Every command takes ``--json``, which prints JSON and nothing else on standard output, and ``--quiet``, which prints nothing but
errors (and the JSON, where both are given). Progress and warnings go to standard error.

Exit codes:

- 0: done.
- 1: it was tried and failed: a training that gave no usable model, a cell of a benchmark, a model that could not be built. Also,
  without a word, where the reader of standard output went away (``| head``), and for an error of this program itself, which
  shows a traceback.
- 2: unusable input: an unknown name or option, a file that cannot be read or written, data that do not fit. One line on standard
  error says what was wrong and what is allowed. Where a disk is full, the files that were there are there still.
- 3: ``repair`` alone: there are signs of a backdoor that pruning within the budget does not remove. All results are written.
- 130: interrupted from the keyboard. ``benchmark``, ``train`` and ``infect`` go on from there when called again.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import NoReturn

import typer

from ..errors import BackdoorGymError, TrainingError
from ..wording import one_line
from . import benchmark, detect, infect, inspect, listing, repair, train, zoo

# What is heavy (torch) is imported by the commands that need it, so that --help is quick.

EXIT_CODES = (
    "Exit codes: 0 done; 1 tried and failed; 2 unusable input, told in one line; 3 unrepairable; 130 interrupted."
)

app = typer.Typer(
    help="Find and prune the backdoor of an infected neural network.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "detect": detect.detect,
    "repair": repair.repair,
    "benchmark": benchmark.benchmark,
    "train": train.train,
    "infect": infect.infect,
    "list": listing.list_models,
    "inspect": inspect.inspect,
}
for name, command in _COMMANDS.items():
    app.command(name, epilog=EXIT_CODES)(command)

family = typer.Typer(help="Infected models made from their names.", epilog=EXIT_CODES, no_args_is_help=True)
family.command("build", epilog=EXIT_CODES)(zoo.build)
app.add_typer(family, name="zoo")


def main() -> None:
    """Entry point: errors a user can cause end in one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the locale has no character for
    try:
        app()
    except TrainingError as error:
        _fail(error, 1)
    except (BackdoorGymError, OSError) as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> NoReturn:
    with suppress(OSError):
        print(f"error: {one_line(str(error))}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again when it ends, and have its own exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
