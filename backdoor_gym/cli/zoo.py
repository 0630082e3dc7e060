"""``backdoor-gym zoo build``."""

import os
from typing import Annotated

import typer
from rich.progress import Progress

from ..errors import DataError, TrainingError
from .common import JsonOption, Output, QuietOption, RayOption, errors


def build(
    patterns: Annotated[
        list[str], typer.Argument(help="Names or patterns, such as 'digits-train/*' or digits-test/3.")
    ],
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a processor.")] = None,
    most: Annotated[int | None, typer.Option(min=1, help="Make only the first so many of each pattern.")] = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make models of the procedural family in advance. What is in the cache is not made again."""
    from ..models import building, family
    from ..models.catalogue import resolve

    output = Output(as_json, quiet)
    names = [name for pattern in patterns for name in resolve(pattern)[:most]]
    fixed = [name for name in names if not family.is_member(name)]
    if fixed:
        raise DataError(
            f"{fixed[0]} is not made on demand; allowed are {', '.join(f'{split}/<seed>' for split in family.SPLITS)}"
        )
    failed: dict[str, str] = {}
    with output.working(), Progress(console=errors, disable=not output.bars) as progress:
        task = progress.add_task("building", total=len(names))
        for name, problem in building.build(names, jobs or os.cpu_count() or 1, ray):
            progress.update(task, advance=1, description=name)
            if problem:
                failed[name] = problem
    output.result({"built": len(names) - len(failed), "failed": failed})
    output.say(f"{len(names) - len(failed)} of {len(names)} models are in the cache.")
    if failed:
        raise TrainingError("; ".join(f"{name}: {problem}" for name, problem in failed.items()))
