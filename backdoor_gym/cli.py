"""The command line: ``backdoor-gym repair | benchmark | train | infect | list | inspect | zoo build``.

Exit codes: 0 done; 1 something could not be made; 2 unusable input, with one line that says what was wrong.
"""

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .errors import BackdoorGymError, DataError, TrainingError

if TYPE_CHECKING:
    from .metrics import Metrics

# What is heavy (torch) is imported by the commands that need it, so that --help is quick.

app = typer.Typer(
    help="Find and prune the backdoor of an infected neural network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo = typer.Typer(help="Infected models made from their names.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")
console = Console()
errors = Console(stderr=True)

DEFAULT_MODEL = "digits-badnets"

DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Hub id or folder to read the images from, instead of the one the model names."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the network runs: cpu, cuda, ...")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", help='Ray cluster that does the work: HOST:PORT, "auto", or "local". Needs the extra "ray".'),
]


@app.command()
def repair(
    model: Annotated[str, typer.Argument(help="Name (see list) or file of an infected model.")] = DEFAULT_MODEL,
    policy: Annotated[
        str,
        typer.Option(
            help="onp; a published rule: clp, bnp, ep, anp, rnp, fine-pruning, magnitude, greedy; random; or the file of a "
            "policy that train wrote (*.safetensors)."
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
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: repaired/NAME.")] = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Repair a network and write it, the list of pruned neurons and a figure."""
    from . import repairing
    from .baselines.thresholds import parse_threshold
    from .policies import BUDGETS, check_policy, kind_of_policy
    from .zoo.catalogue import load_infected

    options: dict[str, Any] = {}
    if threshold is not None:
        options["u" if policy == "clp" else "threshold"] = parse_threshold(threshold)
    if finetune is not None:
        options["finetune"] = finetune
    check_policy(policy, options)
    infected = load_infected(model, data)
    folder = out or Path("repaired") / infected.name.replace("/", "-")
    _check_writable(folder)
    with errors.status("repairing, then scoring on the test images"):
        result = repairing.repair(
            infected,
            policy,
            repairing.DEFAULT_BUDGET if budget is None else budget,
            device=device,
            **options,
        )
    written = result.save(folder)
    if as_json:
        print(json.dumps({**result.report(), "files": [str(path) for path in written]}))
        return
    console.print(_result_table(result.infected.name, result.policy, result.before, result.after, result.der))
    if result.before.asr is None:
        console.print("No trigger is known for this model: ASR and RA cannot be measured.")
    if result.verdict is not None:
        console.print(_verdict(result.verdict, result.suspected_target, len(result.pruned)))
    console.print(
        f"Pruned {len(result.pruned)} of {len(result.neurons)} neurons{_said(result.settings)} in {result.seconds:.1f} s; "
        f"accuracy on the {len(infected.clean)} clean images {result.clean_acc_before:.3f} -> {result.clean_acc_after:.3f}."
    )
    if threshold is None and BUDGETS[kind_of_policy(policy)] is None:
        console.print("The published threshold was used; --threshold auto chooses it with the clean images.")
    for path in written:
        console.print(f"  {path}", highlight=False)


@app.command()
def benchmark(
    infected: Annotated[list[str], typer.Option(help="Names, patterns or files of infected models.")],
    policies: Annotated[
        list[str],
        typer.Option(
            help="NAME[:THRESHOLD] (onp, clp, clp:auto, bnp, ...), the file of a policy, or package.module:factory; repeat "
            "the option, or separate by commas."
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
    out: Annotated[Path, typer.Option(help="Folder for cells, table and figures.")] = Path("benchmark"),
    data: DataOption = None,
    device: DeviceOption = "cpu",
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare policies on many models. Killed and called again, it goes on after the last finished cell."""
    from .benchmarking import benchmark as run

    _check_writable(out)
    done = run(
        [part for text in infected for part in text.split(",")],
        [part for text in policies for part in text.split(",")],
        [_budget(part) for part in budgets.split(",")],
        seeds=seeds,
        out=out,
        most=most,
        jobs=jobs,
        clean_samples=clean_samples,
        test_samples=test_samples,
        max_steps=max_steps,
        data=data,
        device=device,
        ray=ray,
        progress=not as_json,
    )
    if as_json:
        print(json.dumps([asdict(result) for result in done.results]))
    else:
        console.print(done.table, markup=False, highlight=False, soft_wrap=True)
        for path in done.files:
            console.print(f"  {path}", highlight=False)
    if done.failed:
        raise TrainingError(
            f"{len(done.failed)} of {len(done.results)} cells failed; the first: {done.failed[0].error}"
        )


@app.command()
def train(
    infected: Annotated[
        list[str] | None, typer.Option(help="Names or patterns to learn from; default: digits-train/*.")
    ] = None,
    validate: Annotated[
        list[str] | None, typer.Option(help="Names or patterns that every choice is made on; default: digits-val/*.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Only the first so many of each training pattern.")] = 300,
    validation_models: Annotated[int, typer.Option(min=1, help="The same for validation.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="Environment steps of reinforcement.")] = 3_072,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    envs: Annotated[int, typer.Option(min=1, help="Sub-environments, among which the models are divided.")] = 16,
    warm_epochs: Annotated[
        int, typer.Option(min=0, help="Passes over the models for a first guess from derivatives; 0 for none.")
    ] = 50,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes for the examples of that guess, or with --ray for the episodes; default: one a processor.",
        ),
    ] = None,
    message_passing: Annotated[
        bool, typer.Option(help="Let the policy see the connections, or each neuron alone.")
    ] = True,
    per_layer: Annotated[
        bool,
        typer.Option("--per-layer", help="One agent a layer, all with the same policy; a step is one of an agent."),
    ] = False,
    calibration_models: Annotated[
        int,
        typer.Option(min=0, help="The same for the threshold of the verdict alone, which is quicker; 0 to keep 0.1."),
    ] = 120,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
    out: Annotated[Path, typer.Option(help="File of the policy.")] = Path("policies/onp.safetensors"),
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", help='Train with RLlib on that Ray cluster: HOST:PORT, "auto", or "local". Needs the extra "ray".'
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where a training has ended in it.")] = False,
) -> None:
    """Train a policy on many infected models. Killed and called again, it goes on after the last rollout."""
    from dataclasses import replace

    from .agents.encoder import EncoderOptions
    from .agents.layer_training import train_layers
    from .agents.layers import LAYER_ENCODER
    from .agents.training import checkpoint_of
    from .agents.training import train as train_policy
    from .zoo.catalogue import resolve

    if out.exists() and not checkpoint_of(out).exists() and not force:
        raise DataError(f"{out} exists already; choose another --out, or --force to replace it")
    _check_writable(out.parent)
    names = [name for pattern in infected or ["digits-train/*"] for name in resolve(pattern)[:most]]
    known = [resolve(pattern) for pattern in validate or ["digits-val/*"]]
    judges = [name for pattern in known for name in pattern[:validation_models]]
    report = partial(errors.print, highlight=False, markup=False)
    if ray is not None:
        from .cluster import check_ray

        check_ray()
        if tensorboard is not None:
            raise DataError("--tensorboard is not for --ray: RLlib keeps its own logs (~/ray_results)")
        from .agents.rllib import train_on_cluster

        shape = replace(LAYER_ENCODER if per_layer else EncoderOptions(), message_passing=message_passing)
        runners = jobs or os.cpu_count() or 1
        each = max(1, envs // runners)
        train_on_cluster(
            names,
            judges,
            steps,
            out,
            ray,
            per_layer=per_layer,
            runners=runners,
            envs=each,
            seed=seed,
            epochs=warm_epochs,
            encoder=shape,
            report=report,
        )
        console.print(str(out), highlight=False)
        return
    shared: dict[str, Any] = {
        "seed": seed,
        "jobs": jobs or os.cpu_count() or 1,
        "epochs": warm_epochs,
        "tensorboard_log": tensorboard,
        "progress_bar": errors.is_terminal,
        "report": report,
    }
    if per_layer:
        encoder = replace(LAYER_ENCODER, message_passing=message_passing)
        train_layers(names, judges, steps, out, seats=min(envs, 8), encoder=encoder, **shared)
    else:
        calibration = [name for pattern in known for name in pattern[:calibration_models]]
        encoder = EncoderOptions(message_passing=message_passing)
        train_policy(names, judges, steps, out, envs=envs, encoder=encoder, calibration=calibration, **shared)
    console.print(str(out), highlight=False)


@app.command()
def infect(
    dataset: Annotated[
        str, typer.Option("--data", help="digits, a Hub id (uoft-cs/cifar10), or a local folder.")
    ] = "digits",
    architecture: Annotated[
        str, typer.Option("--arch", help="small_cnn, resnet18, preact_resnet18, vgg16, wrn16.")
    ] = "small_cnn",
    attack: Annotated[str, typer.Option(help="badnets, blended, sig, wanet, or clean for no backdoor.")] = "badnets",
    width: Annotated[int | None, typer.Option(min=1, help="Width of the network; default: as published.")] = None,
    target: Annotated[int, typer.Option(help="Label that the trigger calls.")] = 0,
    poison_rate: Annotated[float, typer.Option(help="Share of the training images that are poisoned.")] = 0.1,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    clean_images: Annotated[int, typer.Option(min=1, help="Images kept for the defender.")] = 500,
    arch_option: Annotated[
        list[str] | None, typer.Option(help="Further option of the architecture, KEY=VALUE.")
    ] = None,
    attack_option: Annotated[list[str] | None, typer.Option(help="Further option of the attack, KEY=VALUE.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: infected/ARCH-ATTACK-SEED.safetensors.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it exists.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Save the weights as float16, for half the size.")] = False,
    device: DeviceOption = "cpu",
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network with a backdoor. Killed and called again, it goes on after the last finished epoch."""
    from .cluster import cluster
    from .zoo import infecting
    from .zoo.training import Schedule

    path = out or Path("infected") / f"{architecture}-{attack}-{seed}.safetensors"
    if path.exists() and not force:
        raise DataError(f"{path} exists already; choose another --out, or --force to replace it")
    _check_writable(path.parent)
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    small = dataset == "digits"
    options = _pairs(arch_option, "--arch-option")
    if width is not None:
        options["width"] = width
    make = partial(
        infecting.infect,
        dataset,
        architecture,
        attack,
        target=target,
        poison_rate=poison_rate,
        seed=seed,
        schedule=Schedule(epochs=epochs, batch_size=64, learning_rate=0.05, augment=False)
        if small
        else Schedule(epochs),
        architecture_options=options,
        attack_options=_pairs(attack_option, "--attack-option"),
        clean_images=clean_images,
        device=device,
        half=half,
        name=path.stem,
    )
    if ray is None:
        model = make(checkpoint=checkpoint, progress=not as_json)
    else:  # begun again where its machine dies: its checkpoint would be on that machine
        with cluster(ray) as machines:
            model = machines.submit(make).result()
    model.save(path, half)
    checkpoint.unlink(missing_ok=True)
    if as_json:
        print(json.dumps({"file": str(path), **model.facts}))
        return
    asr = "" if model.facts["asr"] is None else f", ASR {model.facts['asr']:.3f}"
    console.print(f"{path}: ACC {model.facts['acc']:.3f}{asr}", highlight=False)


@app.command("list")
def list_models(
    pattern: Annotated[str | None, typer.Argument(help="Pattern such as digits-test/*; default: an overview.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List infected models, architectures and attacks."""
    from .errors import UnknownNameError
    from .zoo import family
    from .zoo.architectures import ARCHITECTURES
    from .zoo.attacks import ATTACKS
    from .zoo.catalogue import list_infected

    if pattern is not None:
        names = list_infected(pattern)
        if not names:
            raise UnknownNameError("pattern", pattern, ["digits-*", *(f"{split}/*" for split in family.SPLITS)])
        print(json.dumps(names) if as_json else "\n".join(names))
        return
    embedded = [name for name in list_infected() if "/" not in name]
    overview: dict[str, Any] = {
        "embedded": embedded,
        "families": {f"{split}/<seed>": _count_cached(split) for split in family.SPLITS},
        "architectures": sorted(ARCHITECTURES),
        "attacks": [*sorted(ATTACKS), "clean"],
    }
    if as_json:
        print(json.dumps(overview))
        return
    console.print(f"Embedded models   {', '.join(embedded)}", highlight=False)
    for name, cached in overview["families"].items():
        console.print(f"Made on demand    {name} ({cached} in the cache)", highlight=False, markup=False)
    console.print(f"Architectures     {', '.join(overview['architectures'])}", highlight=False)
    console.print(f"Attacks           {', '.join(overview['attacks'])}", highlight=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Name (see list) or file of an infected model.")] = DEFAULT_MODEL,
    u: Annotated[float, typer.Option(help="Standard deviations from which UCLC counts as an outlier.")] = 3.0,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the layers and neurons of a network, and whose UCLC stands out."""
    from .graph.features import standardise
    from .graph.uclc import uclc
    from .pruning.neurons import find_neurons
    from .zoo.catalogue import load_infected

    infected = load_infected(model, data)
    neurons = find_neurons(infected.network)
    rows: list[dict[str, Any]] = []
    for layer, bounds in zip(neurons.layers, uclc(infected.network, neurons), strict=True):
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
    facts = {"name": infected.name, "architecture": infected.architecture, "neurons": len(neurons), **infected.facts}
    if as_json:
        print(json.dumps({**facts, "u": u, "layers": rows}))
        return
    for key, value in facts.items():
        console.print(f"{key:<14} {value}", highlight=False, markup=False)
    table = Table("layer", "neurons", "UCLC mean", "UCLC max", f"outliers, more than {u:g} deviations above the mean")
    for row in rows:
        found = sorted(row["outliers"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name.rpartition('[')[2][:-1]} ({score:.1f})" for name, score in found[:6])
        more = f", and {len(found) - 6} more" if len(found) > 6 else ""
        table.add_row(
            row["layer"], str(row["neurons"]), f"{row['uclc_mean']:.3f}", f"{row['uclc_max']:.3f}", shown + more
        )
    console.print(table)


@zoo.command("build")
def zoo_build(
    patterns: Annotated[
        list[str], typer.Argument(help="Names or patterns, such as 'digits-train/*' or digits-test/3.")
    ],
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a processor.")] = None,
    most: Annotated[int | None, typer.Option(min=1, help="Make only the first so many of each pattern.")] = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make models of the procedural family in advance. What is in the cache is not made again."""
    from .zoo import building, family
    from .zoo.catalogue import resolve

    names = [name for pattern in patterns for name in resolve(pattern)[:most]]
    fixed = [name for name in names if not family.is_member(name)]
    if fixed:
        raise DataError(
            f"{fixed[0]} is not made on demand; allowed are {', '.join(f'{split}/<seed>' for split in family.SPLITS)}"
        )
    failed: dict[str, str] = {}
    with Progress(console=errors, disable=as_json) as progress:
        task = progress.add_task("building", total=len(names))
        for name, problem in building.build(names, jobs or os.cpu_count() or 1, ray):
            progress.update(task, advance=1, description=name)
            if problem:
                failed[name] = problem
    if as_json:
        print(json.dumps({"built": len(names) - len(failed), "failed": failed}))
    else:
        console.print(f"{len(names) - len(failed)} of {len(names)} models are in the cache.")
    if failed:
        raise TrainingError("; ".join(f"{name}: {problem}" for name, problem in failed.items()))


def main() -> None:
    """Entry point: errors a user can cause end in one line."""
    try:
        app()
    except TrainingError as error:
        _fail(error, 1)
    except (BackdoorGymError, OSError) as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def _budget(text: str) -> float | None:
    if text == "own":
        return None
    try:
        return float(text)
    except ValueError:
        raise DataError(f'--budgets takes shares and "own", not {text!r}') from None


def _check_writable(folder: Path) -> None:
    """Find out before the work, not after it, that the results cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # permissions alone do not tell: the superuser has them all
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be written: {error.strerror}") from error


def _pairs(options: list[str] | None, flag: str) -> dict[str, Any]:
    """KEY=VALUE options; values are read as JSON where they are that, and as text otherwise."""
    pairs = {}
    for option in options or []:
        key, sign, value = option.partition("=")
        if not sign or not key:
            raise DataError(f"{flag} takes KEY=VALUE, not {option!r}")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


def _said(settings: dict[str, Any]) -> str:
    said = (f"{key} = {value if isinstance(value, str) else f'{value:g}'}" for key, value in settings.items())
    return f" ({', '.join(said)})" if settings else ""


def _verdict(score: float, target: int | None, pruned: int) -> str:
    said = f"(score {score:.3f} of 1)"
    if not pruned and score < 0.5:
        return f"No sign of a backdoor: nothing pruned {said}."
    whose = "" if target is None else f", which seems to call label {target}"
    but = "" if pruned else ", but nothing was pruned"
    return f"Signs of a backdoor{whose}{but} {said}."


def _count_cached(split: str) -> int:
    from .zoo.family import cache_path

    return len(list(cache_path(f"{split}/0").parent.glob("*.safetensors")))


def _result_table(name: str, policy: str, before: "Metrics", after: "Metrics", der: float | None) -> Table:
    table = Table("", "before", "after", title=f"{name}, {policy}")
    for key, label in (("acc", "ACC"), ("asr", "ASR"), ("ra", "RA")):
        values = [getattr(metrics, key) for metrics in (before, after)]
        table.add_row(label, *("unknown" if value is None else f"{value:.3f}" for value in values))
    table.add_row("DER", "", "unknown" if der is None else f"{der:.3f}")
    return table


if __name__ == "__main__":
    main()
