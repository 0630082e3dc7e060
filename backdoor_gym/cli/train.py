"""``backdoor-gym train``."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError
from .common import JsonOption, Output, QuietOption, as_place, check_writable, errors


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
    ] = False,
    tensorboard: Annotated[Path | None, typer.Option(parser=as_place, help="Folder for TensorBoard.")] = None,
    out: Annotated[Path, typer.Option(parser=as_place, help="File of the policy.")] = Path("policies/onp.safetensors"),
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", help='Train with RLlib on that Ray cluster: HOST:PORT, "auto", or "local". Needs the extra "ray".'
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where a training has ended in it.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a policy on many infected models. Killed and called again, it goes on after the last rollout.

    Without options it trains the policy that comes with the package.
    """
    from ..agents import training
    from ..agents.encoder import EncoderOptions
    from ..models.catalogue import resolve

    output = Output(as_json, quiet)
    checkpoint, best = training.checkpoint_of(out), training.best_of(out)
    check_writable(out, checkpoint, best)
    if out.exists() and not checkpoint.exists() and not force:
        best.unlink(missing_ok=True)
        raise DataError(f"{out} exists already; choose another --out, or --force to replace it")
    names = [name for pattern in infected or ["digits-train/*"] for name in resolve(pattern)[:most]]
    known = [resolve(pattern) for pattern in validate or ["digits-val/*"]]
    judges = [name for pattern in known for name in pattern[:validation_models]]
    processes = jobs or os.cpu_count() or 1
    make: Any
    if ray is not None:
        from ..on_ray.cluster import check_ray

        check_ray()
        if tensorboard is not None:
            raise DataError("--tensorboard is not for --ray: RLlib keeps its own logs (~/ray_results)")
        from ..on_ray.rllib import train_on_cluster

        make = partial(train_on_cluster, address=ray, runners=processes, envs=max(1, envs // processes))
    else:
        make = partial(
            training.train,
            envs=envs,
            jobs=processes,
            tensorboard_log=tensorboard,
            progress_bar=output.bars and errors.is_terminal,
        )
    encoder = EncoderOptions(message_passing=message_passing)
    with output.working():
        onp = make(names, judges, steps, out, seed=seed, epochs=warm_epochs, encoder=encoder, report=output.note)
    output.result({"file": str(out), **onp.facts})
    output.say(str(out))
