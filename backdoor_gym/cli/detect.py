"""``backdoor-gym detect``."""

from pathlib import Path
from typing import Annotated

import typer

from ..wording import path_component
from . import own_network
from .common import (
    DEFAULT_MODEL,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    Output,
    QuietOption,
    as_place,
    check_writable,
)


@own_network.takes_network
def detect(
    model: ModelArgument = DEFAULT_MODEL,
    out: Annotated[
        Path | None,
        typer.Option(parser=as_place, help="Picture of the inverted trigger (PNG); default: detected/NAME.png."),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    network: own_network.OwnNetwork = own_network.NOTHING_SAID,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tell whether a network has a backdoor, and which label it calls. Nothing is pruned."""
    from .. import detecting

    output = Output(as_json, quiet)
    infected = own_network.read_model(output, model, data, network)
    picture = out or Path("detected") / f"{path_component(infected.name)}.png"
    check_writable(picture)
    with output.working("looking for a trigger") as watch:
        detection = detecting.detect(infected, device=device, watch=watch)
        written = [] if detection.evidence.inverted is None else [str(detection.save_trigger(picture))]
    output.result({**detection.report(), "files": written})
    output.say(str(detection), style="red" if detection.suspicious else "green")
    for name, value in detection.evidence.signs.items():
        output.say(f"  {name:<10} {value:6.2f}")
    for path in written:
        output.say(f"The trigger that was {'found' if detection.suspicious else 'sought'}: {path}")
