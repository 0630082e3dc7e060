"""``backdoor-gym benchmark``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError, TrainingError
from . import own_network
from .common import (
    DataOption,
    DeviceOption,
    JsonOption,
    Output,
    QuietOption,
    RayOption,
    ResidualOption,
    as_place,
    check_writable,
)


@own_network.takes_network
def benchmark(
    infected: Annotated[
        list[str], typer.Option(help="Names, patterns or files of infected models, or networks of your own.")
    ],
    policies: Annotated[
        list[str],
        typer.Option(
            help="NAME, NAME:THRESHOLD or NAME:OPTION=VALUE (onp, clp:auto, anp:steps=500, ...), the file of a policy, or "
            "package.module:factory; repeat the option, or separate by commas."
        ),
    ] = ["onp", "clp", "bnp", "random"],  # noqa: B006 (typer copies it)
    budgets: Annotated[
        str,
        typer.Option(
            help='Accuracy that may be lost on the defender\'s images, 0.02 is two points; "own" for each policy as published.'
        ),
    ] = "own,0.01,0.02,0.05",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the policies that a seed changes.")] = 1,
    most: Annotated[int | None, typer.Option(min=1, help="Only the first so many models of each pattern.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a processor.")] = None,
    clean_samples: Annotated[
        int | None, typer.Option(min=1, help="How many of the defender's clean images are used; default: all.")
    ] = None,
    test_samples: Annotated[
        int | None, typer.Option(min=1, help="How many test images are scored on; default: all.")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Most prunes under a budget.")] = 100,
    out: Annotated[Path, typer.Option(parser=as_place, help="Folder for cells, table and figures.")] = Path(
        "benchmark"
    ),
    residual: ResidualOption = "channel",
    data: DataOption = None,
    device: DeviceOption = "cpu",
    ray: RayOption = None,
    network: own_network.OwnNetwork = own_network.NOTHING_SAID,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare policies on many models. Killed and called again, it goes on after the last finished cell."""
    from ..benchmarking import benchmark as run
    from ..benchmarking.running import FILES

    output = Output(as_json, quiet)
    check_writable(*(out / name for name in FILES))
    models = own_network.read_foreign(output, [part for text in infected for part in text.split(",")], data, network)
    with output.working():
        done = run(
            models,
            [part for text in policies for part in text.split(",")],
            [_budget(part) for part in budgets.split(",")],
            seeds=seeds,
            out=out,
            most=most,
            jobs=jobs,
            clean_samples=clean_samples,
            test_samples=test_samples,
            max_steps=max_steps,
            residual=residual,
            data=data,
            device=device,
            ray=ray,
            progress=output.bars,
        )
    output.result([asdict(result) for result in done.results])
    output.say(done.table)
    for path in done.files:
        output.say(f"  {path}")
    if done.failed:
        raise TrainingError(
            f"{len(done.failed)} of {len(done.results)} cells failed; the first: {done.failed[0].error}"
        )


def _budget(text: str) -> float | None:
    if text == "own":
        return None
    try:
        return float(text)
    except ValueError:
        raise DataError(f'--budgets takes shares and "own", not {text!r}') from None
