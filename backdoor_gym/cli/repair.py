"""``backdoor-gym repair``."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import DataError
from ..outcomes import REPAIRED, UNREPAIRABLE, UNTOUCHED
from ..wording import path_component, printable
from . import own_network
from .common import (
    DEFAULT_MODEL,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    Output,
    QuietOption,
    ResidualOption,
    as_place,
    check_writable,
)

if TYPE_CHECKING:
    from ..metrics import Metrics

#: Clean accuracy below which images, labels or normalisation are probably not what a network was trained on.
DOUBTFUL = 0.5
EXIT_UNREPAIRABLE = 3
STYLES = {UNTOUCHED: "green", REPAIRED: "green", UNREPAIRABLE: "red"}


@own_network.takes_network
def repair(
    model: ModelArgument = DEFAULT_MODEL,
    policy: Annotated[
        str,
        typer.Option(
            help="onp; a published rule: clp, bnp, ep, anp, rnp, fine-pruning, magnitude, greedy; ridge; random; or the file of "
            "a policy that train wrote (*.safetensors)."
        ),
    ] = "onp",
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            "--u",
            help='Of a published rule: a number (u of clp, default 3), "auto" to choose it with the clean images, or "budget" '
            "to prune as long as --budget allows.",
        ),
    ] = None,
    finetune: Annotated[
        int | None,
        typer.Option(min=0, help="Steps that onp first learns on this network, from its clean images alone."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Clean accuracy that may be lost, 0.02 is two points; a prune beyond it is undone. "
            "Default: 0.01 for onp, none for rules with a published threshold, 0.02 for the others."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=as_place, help="Folder for the results; default: repaired/NAME.")
    ] = None,
    verdict: Annotated[
        bool | None,
        typer.Option(
            help="Whether a network without signs of a backdoor stays as it is. Default: yes for onp and ridge, no for rules."
        ),
    ] = None,
    take_back: Annotated[
        bool, typer.Option(help="Give the network back as it came where pruning does not remove the signs.")
    ] = True,
    residual: ResidualOption = "channel",
    fill: Annotated[
        str,
        typer.Option(
            help='What pruned neurons give: "zero", or "mean" for their mean over the clean images, which disturbs less.'
        ),
    ] = "zero",
    data: DataOption = None,
    device: DeviceOption = "cpu",
    network: own_network.OwnNetwork = own_network.NOTHING_SAID,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Repair a network and write it, a report to look at, and the list of pruned neurons.

    Exit code 3 says that there are signs of a backdoor which pruning within the budget does not remove.
    """
    from .. import repairing
    from ..analysis.evidence import SILENT
    from ..policies.registry import POLICIES, check_policy, kind_of_policy, options_of
    from ..policies.thresholds import parse_threshold
    from ..reporting.result import files_of

    output = Output(as_json, quiet)
    options: dict[str, Any] = {}
    if threshold is not None:
        symbol = POLICIES[kind_of_policy(policy)].threshold
        if symbol is None:
            raise _no_option_of(policy, "--threshold (--u)", [name for name in POLICIES if POLICIES[name].threshold])
        options[symbol] = parse_threshold(threshold)
    if finetune is not None:
        if "finetune" not in options_of(policy):
            raise _no_option_of(policy, "--finetune", [name for name in POLICIES if "finetune" in options_of(name)])
        options["finetune"] = finetune
    check_policy(policy, options)
    infected = own_network.read_model(output, model, data, network)
    folder = out or Path("repaired") / path_component(infected.name)
    check_writable(*(folder / name for name in files_of(infected)))
    with output.working("reading the neurons") as watch:
        result = repairing.repair(
            infected,
            policy,
            repairing.DEFAULT_BUDGET if budget is None else budget,
            residual=residual,
            fill=fill,
            device=device,
            watch=watch,
            verdict=verdict,
            take_back=take_back,
            **options,
        )
        watch("writing the report", 0, None)
        written = result.save(folder, shlex.join(["backdoor-gym", *sys.argv[1:]]))
    output.result({**result.report(), "files": [str(path) for path in written]})
    output.say(result_table(result.infected.name, result.policy, result.before, result.after, result.der))
    if result.before.asr is None:
        output.say("No trigger is known for this model: ASR and RA cannot be measured.")
    if result.verdict is not None:
        if result.evidence.signs:
            said = outcome_in_words(result.outcome, result.verdict, result.suspected_target, len(result.pruned))
            output.say(said, style=STYLES[result.outcome])
        else:
            output.say(f"The network is as it came: {SILENT}.", style="yellow")
    output.say(
        f"Pruned {len(result.pruned)} of {len(result.neurons)} neurons{_said(result.settings)} in {result.seconds:.1f} s; "
        f"accuracy on the {len(infected.clean)} clean images {result.clean_acc_before:.3f} -> {result.clean_acc_after:.3f}."
    )
    if result.pruned:
        output.say(f"On the half of them that guards it, the true labels lost {result.lost} points of probability.")
    if threshold is None and POLICIES[kind_of_policy(policy)].budget is None:
        output.say("The published threshold was used; --threshold auto chooses it with the clean images.")
    rest = " The report names those that do not." if result.neurons.left_out else ""
    output.say(f"{own_network.coverage_in_words(result.neurons)}{rest}")
    for note in result.neurons.notes:
        output.say(note)
    for path in written:
        output.say(f"  {path}")
    if infected.layout is not None:
        output.say(f"{folder} holds the network in the form that it came in.")
    elif infected.checkpoint is not None:
        if result.norms_off:
            output.say(
                "The repaired weights are plain ones, without the weight norms and other parametrizations of your class; take "
                f"those off before it loads them (import torch):\n{result.norms_off.rstrip()}"
            )
        output.say(
            f'Your own class takes the repaired weights: network.load_state_dict(safetensors.torch.load_file("{written[0]}")).'
        )
    if infected.checkpoint is not None and result.clean_acc_before < DOUBTFUL:
        output.note(
            f"The network knew {result.clean_acc_before:.0%} of the clean images before the repair. If it is better than "
            "that, look at --mean and --std (what it does to images in [0, 1]), the order of the labels, the image size."
        )
    if result.outcome == UNREPAIRABLE:
        raise typer.Exit(EXIT_UNREPAIRABLE)


def outcome_in_words(outcome: str, probability: float, target: int | None, pruned: int) -> str:
    """How a repair with a verdict ended, in one sentence."""
    sure = f"probability of a backdoor {probability:.0%}"
    if outcome == UNTOUCHED:
        return f"No sign of a backdoor ({sure}): the network is as it came."
    whose = "" if target is None else f" that calls label {target}"
    if outcome == REPAIRED:
        return f"Repaired: signs of a backdoor{whose} ({sure}), most of which are gone."
    left = f"{pruned} neurons were pruned all the same" if pruned else "the network is as it came"
    return (
        f"Cannot be repaired by pruning within this budget: signs of a backdoor{whose} ({sure}) stay; {left}. "
        "A larger --budget may help."
    )


def result_table(name: str, policy: str, before: "Metrics", after: "Metrics", der: float | None) -> Table:
    """ACC, ASR, RA and DER before and after."""
    table = Table("", "before", "after", title=printable(f"{name}, {policy}"))
    for key, label in (("acc", "ACC"), ("asr", "ASR"), ("ra", "RA")):
        values = [getattr(metrics, key) for metrics in (before, after)]
        table.add_row(label, *("unknown" if value is None else f"{value:.3f}" for value in values))
    table.add_row("DER", "", "unknown" if der is None else f"{der:.3f}")
    return table


def _no_option_of(policy: str, flag: str, owners: list[str]) -> DataError:
    return DataError(f"{flag} is an option of {', '.join(owners)}, and not of {policy}")


def _said(settings: dict[str, Any]) -> str:
    said = (f"{key} = {value if isinstance(value, str) else f'{value:g}'}" for key, value in settings.items())
    return f" ({', '.join(said)})" if settings else ""
