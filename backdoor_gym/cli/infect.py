"""``backdoor-gym infect``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError, check_name
from .common import DeviceOption, JsonOption, Output, QuietOption, RayOption, as_place, check_writable, pairs


def infect(
    dataset: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, a Hub id (uoft-cs/cifar10), or a local folder; of the last two with how they are read, if need be: "
            "?label=COLUMN&size=HEIGHTxWIDTH&channels=1",
        ),
    ] = "digits",
    architecture: Annotated[str, typer.Option("--arch", help="One of those that list names.")] = "small_cnn",
    attack: Annotated[str, typer.Option(help="One of those that list names, or clean for no backdoor.")] = "badnets",
    width: Annotated[int | None, typer.Option(min=1, help="Width of the network; default: as published.")] = None,
    target: Annotated[
        str, typer.Option(help="Label that the trigger calls, or all-to-all: of each class the next one.")
    ] = "0",
    poison_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the training images that are poisoned, default 0.1; of label-consistent the share of the "
            "target class's, default 0.5."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    flip: Annotated[
        bool, typer.Option(help="Mirror images at random in training; not for digits or traffic signs.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    clean_images: Annotated[int, typer.Option(min=1, help="Images kept for the defender.")] = 500,
    arch_option: Annotated[
        list[str] | None, typer.Option(help="Further option of the architecture, KEY=VALUE.")
    ] = None,
    attack_option: Annotated[list[str] | None, typer.Option(help="Further option of the attack, KEY=VALUE.")] = None,
    adaptive: Annotated[
        list[str] | None,
        typer.Option(
            help="What the attacker knows of defences: clp (outliers of UCLC cost in training), bn (BN statistics are those "
            "of clean images in the end); repeat for both."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=as_place, help="File to write; default: infected/ARCH-ATTACK-SEED.safetensors."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where a training has ended in it.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Save the weights as float16, for half the size.")] = False,
    device: DeviceOption = "cpu",
    ray: RayOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network with a backdoor. Killed and called again, it goes on after the last finished epoch."""
    from ..analysis.uclc_penalty import UCLCPenalty
    from ..attacks.targets import parse_target
    from ..models import infecting
    from ..models.training import Schedule
    from ..on_ray.cluster import cluster

    output = Output(as_json, quiet)
    known = adaptive or []
    for defence in known:
        check_name("defence of --adaptive", defence, ("clp", "bn"))
    path = out or Path("infected") / f"{architecture}-{attack}-{seed}.safetensors"
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    check_writable(path, checkpoint)
    if path.exists() and not checkpoint.exists() and not force:
        raise DataError(f"{path} exists already; choose another --out, or --force to replace it")
    schedule = Schedule(epochs, flip=flip)
    if dataset == "digits":
        schedule = Schedule(epochs, batch_size=64, learning_rate=0.05, augment=False)
    options = pairs(arch_option, "--arch-option")
    if width is not None:
        options["width"] = width
    make = partial(
        infecting.infect,
        dataset,
        architecture,
        attack,
        target=parse_target(target),
        poison_rate=poison_rate,
        seed=seed,
        schedule=schedule,
        architecture_options=options,
        attack_options=pairs(attack_option, "--attack-option"),
        clean_images=clean_images,
        penalty=UCLCPenalty() if "clp" in known else None,
        recalibrated="bn" in known,
        device=device,
        half=half,
        name=path.stem,
    )
    with output.working():
        if ray is None:
            model = make(checkpoint=checkpoint, progress=output.bars)
        else:  # begun again where its machine dies: its checkpoint would be on that machine
            with cluster(ray) as machines:
                model = machines.submit(make).result()
    model.save(path, half)
    checkpoint.unlink(missing_ok=True)
    output.result({"file": str(path), **model.facts})
    asr = "" if model.facts["asr"] is None else f", ASR {model.facts['asr']:.3f}"
    output.say(f"{path}: ACC {model.facts['acc']:.3f}{asr}")
