"""``backdoor-gym inspect``."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ..wording import one_line, printable
from . import own_network
from .common import DEFAULT_MODEL, DataOption, JsonOption, ModelArgument, Output, QuietOption


@own_network.takes_network
def inspect(
    model: ModelArgument = DEFAULT_MODEL,
    u: Annotated[float, typer.Option(help="Standard deviations from which UCLC counts as an outlier.")] = 3.0,
    data: DataOption = None,
    network: own_network.OwnNetwork = own_network.NOTHING_SAID,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show the layers and neurons of a network, and whose UCLC stands out."""
    from ..analysis.features import standardise
    from ..analysis.uclc import uclc
    from ..neurons.finding import find_neurons
    from ..neurons.layers import Account

    output = Output(as_json, quiet)
    rows: list[dict[str, Any]] = []
    infected = own_network.read_model(output, model, data, network)
    with output.working("reading its neurons"):
        neurons = find_neurons(infected.network, infected.clean.first(2).images)
        bounds_of_layers = uclc(neurons.graph, neurons)
    for layer, bounds in zip(neurons.layers, bounds_of_layers, strict=True):
        scores = standardise(bounds)
        outliers = {f"{layer.name}[{i}]": round(scores[i].item(), 2) for i in (scores > u).nonzero().flatten().tolist()}
        rows.append(
            {
                "layer": layer.name,
                "neurons": layer.size,
                "reads": [feeder.module for feeder in layer.feeders],
                "uclc_mean": bounds.mean().item(),
                "uclc_max": bounds.max().item(),
                "outliers": outliers,
            }
        )
    facts = {
        "name": infected.name,
        "architecture": infected.architecture,
        "neurons": len(neurons),
        "coverage": round(neurons.coverage, 4),
        **infected.facts,
    }
    left_out = [asdict(account) for account in neurons.left_out]
    output.result({**facts, "u": u, "layers": rows, "left_out": left_out, "notes": list(neurons.notes)})
    for key, value in facts.items():
        output.say(f"{key:<14} {one_line(str(value))}")
    output.say(_table(rows, u))
    output.say(own_network.coverage_in_words(neurons))
    if left_out:
        table = Table("without neurons", "channels", "in neurons", "why")
        together: dict[str, list[Account]] = {}  # what makes no channels, by its reason
        for account in neurons.left_out:
            together.setdefault(account.name if account.channels else str(account.reason), []).append(account)
        for first, *others in together.values():
            more = f" and {len(others)} more" if others else ""
            table.add_row(
                printable(first.name) + more, str(first.channels), str(first.units), printable(first.reason or "")
            )
        output.say(table)
    for note in neurons.notes:
        output.say(note)


def _table(rows: list[dict[str, Any]], u: float) -> Table:
    table = Table("layer", "neurons", "UCLC mean", "UCLC max", f"outliers, more than {u:g} deviations above the mean")
    for row in rows:
        outliers = sorted(row["outliers"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name.rpartition('[')[2][:-1]} ({score:.1f})" for name, score in outliers[:6])
        more = f", and {len(outliers) - 6} more" if len(outliers) > 6 else ""
        table.add_row(
            printable(row["layer"]),
            str(row["neurons"]),
            f"{row['uclc_mean']:.3f}",
            f"{row['uclc_max']:.3f}",
            shown + more,
        )
    return table
