"""Options of the commands that take anybody's network, and reading it."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .common import Output, pairs

if TYPE_CHECKING:
    from ..models.checkpoint_spec import CheckpointSpec
    from ..models.infected import InfectedModel
    from ..neurons.layers import Neurons

PANEL = (
    "A network of your own (its weights: .safetensors, .pt, .pth, .tar; or a folder of transformers, or hf:OWNER/NAME)"
)


def _option(text: str, *flags: str, **limits: Any) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=PANEL, **limits)


@dataclass(frozen=True)
class OwnNetwork:
    """What the options of a command say of anybody's network, as texts; each field is an option."""

    architecture: Annotated[str | None, _option("Architecture that the weights belong to (see list).", "--arch")] = None
    width: Annotated[int | None, _option("Width of it; default: as published.", min=1)] = None
    arch_option: Annotated[list[str] | None, _option("Further option of it, KEY=VALUE.", "--arch-option")] = None
    module: Annotated[
        str | None,
        _option("Your own code instead: package.module:factory, which is imported and run; it gives the network."),
    ] = None
    clean: Annotated[
        str | None,
        _option(
            "Clean images: an .npz (images, labels), a folder with a subfolder a class, a Hub id or a local folder in the Hub's "
            "layout."
        ),
    ] = None
    test: Annotated[str | None, _option("Images to score on, the same way; default: the rest of a named data set.")] = (
        None
    )
    clean_images: Annotated[
        int | None, _option("How many clean images are used; default: 500 of a named data set, else all.", min=1)
    ] = None
    image_size: Annotated[str | None, _option("HEIGHTxWIDTH that images of a folder are resized to.")] = None
    mean: Annotated[
        str | None, _option("What is subtracted from images in [0, 1], a number a channel: 0.5,0.5,0.5.")
    ] = None
    std: Annotated[str | None, _option("What they are divided by then.")] = None
    timm: Annotated[str | None, _option("Network of timm that the weights belong to: resnet18.", "--timm")] = None

    def spec(self) -> "CheckpointSpec":
        """The same as values.

        Raises:
            DataError: a text that is no such value.
        """
        from ..models.checkpoint_spec import CheckpointSpec
        from ..networks.preprocessing import Normalise

        options: dict[str, Any] = pairs(self.arch_option, "--arch-option")
        if self.width is not None:
            options["width"] = self.width
        preprocess = None
        if self.mean is not None or self.std is not None:
            if self.mean is None or self.std is None:
                raise DataError("--mean and --std go together, a number a channel each")
            preprocess = Normalise(_numbers(self.mean, "--mean"), _numbers(self.std, "--std"))
        images = self.clean, self.test, self.clean_images, _size(self.image_size)
        return CheckpointSpec(self.architecture, options, self.module, *images, preprocess, self.timm)


NOTHING_SAID = OwnNetwork()


def takes_network(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of ``OwnNetwork`` as options, in the place of its parameter ``network``."""
    own = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(OwnNetwork)
    ]

    def call(**arguments: Any) -> None:
        network = OwnNetwork(**{option.name: arguments.pop(option.name) for option in own})
        command(**arguments, network=network)

    parameters = [
        part.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        for part in (own if parameter.name == "network" else [parameter])
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    return call


def read_model(output: Output, name: str, data: str | None, network: OwnNetwork) -> "InfectedModel":
    """The model that the arguments of a command name; what was found out of a network of one's own is noted.

    Raises:
        BackdoorGymError: it cannot be read (see ``load_infected``).
    """
    from ..models.catalogue import load_specified

    spec = network.spec()
    with output.working("reading the model"):
        infected = load_specified(name, data, spec)
    # Facts of a file of this package are words of whoever wrote it.
    facts = {} if infected.checkpoint is None else infected.facts
    if unread := facts.get("unread"):
        output.note(f"Left alone in {name}, neither imported nor run: {', '.join(unread)}")
    if known := facts.get("normalised_for"):
        output.note(f"Images are normalised as BackdoorBench does it for {known}; --mean and --std change it.")
    if unused := facts.get("unused"):
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        output.note(f"The network has no place for these tensors of {name}: {', '.join(unused[:3])}{more}")
    if said := facts.get("preprocessing"):
        output.note(f"As the network came with it, images are {said}; --image-size, --mean and --std change it.")
    return infected


def read_foreign(
    output: Output, names: list[str], data: str | None, network: OwnNetwork
) -> list["str | InfectedModel"]:
    """The names, with the model in the place of each that stands for a network of anybody's.

    Raises:
        DataError: options for such a network, and none is named.
        BackdoorGymError: one cannot be read (see ``load_infected``).
    """
    from ..models.catalogue import is_foreign

    spec = network.spec()
    foreign = [name for name in names if is_foreign(name, spec)]
    if spec.said and not foreign:
        raise DataError(f"{spec.said[0]} is for a network of your own, and {', '.join(names)} names none")
    return [read_model(output, name, data, network) if name in foreign else name for name in names]


def coverage_in_words(neurons: "Neurons") -> str:
    """How much of a network can be pruned."""
    outputs = ", ".join(account.name for account in neurons.accounts if account.is_output)
    return f"{neurons.coverage:.0%} of the channels of all layers belong to a neuron; the logits come from {outputs}."


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise DataError(f"--image-size takes HEIGHTxWIDTH, such as 32x32, or one number, not {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"{flag} takes numbers, one a channel, such as 0.5,0.5,0.5, not {text!r}") from None
