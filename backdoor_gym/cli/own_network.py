"""Options of the commands that take anybody's network, and reading it."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .common import Output, pairs

if TYPE_CHECKING:
    from ..models.infected import InfectedModel
    from ..neurons.layers import Neurons

PANEL = (
    "A network of your own (its weights: .safetensors, .pt, .pth, .tar; or a folder of transformers, or hf:OWNER/NAME)"
)

Architecture = Annotated[
    str | None,
    typer.Option("--arch", help="Architecture that the weights belong to (see list).", rich_help_panel=PANEL),
]
Width = Annotated[int | None, typer.Option(min=1, help="Width of it; default: as published.", rich_help_panel=PANEL)]
ArchOption = Annotated[
    list[str] | None, typer.Option("--arch-option", help="Further option of it, KEY=VALUE.", rich_help_panel=PANEL)
]
Module = Annotated[
    str | None,
    typer.Option(
        help="Your own code instead: package.module:factory, which is imported and run; it gives the network.",
        rich_help_panel=PANEL,
    ),
]
Timm = Annotated[
    str | None,
    typer.Option("--timm", help="Network of timm that the weights belong to: resnet18.", rich_help_panel=PANEL),
]
Clean = Annotated[
    str | None,
    typer.Option(
        help="Clean images: an .npz (images, labels), a folder with a subfolder a class, a Hub id or a local folder in the "
        "Hub's layout.",
        rich_help_panel=PANEL,
    ),
]
Test = Annotated[
    str | None,
    typer.Option(
        help="Images to score on, the same way; default: the rest of a named data set.", rich_help_panel=PANEL
    ),
]
CleanImages = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many clean images are used; default: 500 of a named data set, else all.", rich_help_panel=PANEL
    ),
]
ImageSize = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH that images of a folder are resized to.", rich_help_panel=PANEL)
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="What is subtracted from images in [0, 1], a number a channel: 0.5,0.5,0.5.", rich_help_panel=PANEL
    ),
]
Std = Annotated[str | None, typer.Option(help="What they are divided by then.", rich_help_panel=PANEL)]


def read_model(
    output: Output,
    model: str,
    data: str | None,
    *,
    architecture: str | None,
    width: int | None,
    arch_option: list[str] | None,
    module: str | None,
    clean: str | None,
    test: str | None,
    clean_images: int | None,
    image_size: str | None,
    mean: str | None,
    std: str | None,
    timm: str | None,
) -> "InfectedModel":
    """The model that the arguments of a command name.

    Raises:
        BackdoorGymError: it cannot be read (see ``load_infected``).
    """
    from ..models.catalogue import load_infected
    from ..networks.preprocessing import Normalise

    options: dict[str, Any] = pairs(arch_option, "--arch-option")
    if width is not None:
        options["width"] = width
    preprocess = None
    if mean is not None or std is not None:
        if mean is None or std is None:
            raise DataError("--mean and --std go together, a number a channel each")
        preprocess = Normalise(_numbers(mean, "--mean"), _numbers(std, "--std"))
    with output.working("reading the model"):
        infected = load_infected(
            model,
            data,
            architecture=architecture,
            options=options,
            module=module,
            clean=clean,
            test=test,
            clean_images=clean_images,
            image_size=_size(image_size),
            preprocess=preprocess,
            timm=timm,
        )
    if infected.checkpoint is None:  # facts of a file are words of whoever wrote it
        return infected
    if infected.facts.get("unread"):
        output.note(f"Left alone in {model}, neither imported nor run: {', '.join(infected.facts['unread'])}")
    known = infected.facts.get("normalised_for")
    if known:
        output.note(f"Images are normalised as BackdoorBench does it for {known}; --mean and --std change it.")
    unused = infected.facts.get("unused") or []
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        output.note(f"The network has no place for these tensors of {model}: {', '.join(unused[:3])}{more}")
    said = infected.facts.get("preprocessing")
    if said:
        output.note(f"As the network came with it, images are {said}; --image-size, --mean and --std change it.")
    return infected


def coverage_in_words(neurons: "Neurons") -> str:
    """How much of a network can be pruned."""
    outputs = ", ".join(account.name for account in neurons.accounts if account.is_output)
    return f"{neurons.coverage:.0%} of the channels of all layers belong to a neuron; the logits come from {outputs}."


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise DataError(f"--image-size takes HEIGHTxWIDTH, such as 32x32, or one number, not {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"{flag} takes numbers, one a channel, such as 0.5,0.5,0.5, not {text!r}") from None
