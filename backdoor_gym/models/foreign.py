"""Infected models out of other people's checkpoints: weights, the network they belong to, and clean images."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.datasets import LabelledImages
from ..data.pictures import MOST_SIDE
from ..errors import DataError, ModelFileError, UnknownNameError
from ..files.checkpoints import Checkpoint, read_checkpoint
from ..files.fitting import beginnings, fit_weights
from ..networks import ARCHITECTURES, build
from ..networks.adapting import unwrapped
from ..networks.preprocessing import Normalise, Preprocessed, check_preprocess
from ..networks.weights import check_finite
from ..wording import first_line, shown
from .checkpoint_spec import CheckpointSpec, Factory
from .infected import InfectedModel

#: Mean and standard deviation with which BackdoorBench normalises each data set (utils/aggregate_block in its repository).
BACKDOORBENCH: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.5,), (0.5,)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "gtsrb": None,
    "celeba": None,
}
#: Options of architectures whose name means something else there: VGG as published, without BN and with two hidden layers.
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"batch_norm": False, "hidden": 4096} for name in ("vgg11", "vgg13", "vgg16", "vgg19")
}
Shapes = Mapping[str, torch.Size]


def load_foreign(path: str | Path, spec: CheckpointSpec) -> InfectedModel:
    """The infected model of a checkpoint that this package did not write. Nothing that came with it is run.

    Args:
        path: ``.safetensors``, or a torch file (``.pt``, ``.pth``, ``.tar``) with a state dict in it; BackdoorBench's
            ``attack_result.pt`` says itself which architecture, image size and normalisation it wants.
        spec: an architecture or a module that the weights belong to, and clean images.

    Raises:
        ModelFileError: a file without weights, or one whose network is not said.
        WeightsError: weights that do not fit the network.
        DataError: clean images missing, or images that do not fit.
        UnknownNameError: no such architecture.
    """
    checkpoint = read_checkpoint(path)
    if spec.architecture is not None and spec.module is not None:
        raise DataError("a checkpoint belongs to an architecture of this package or to a module of yours, not to both")
    architecture = None if spec.module is not None else find_architecture(checkpoint, spec.architecture)
    trained_on = checkpoint.facts.get("clean_data")
    spec.check_clean(checkpoint.path, f" (the file says that it was trained on {trained_on})" if trained_on else "")
    clean, scoring = spec.read_images(spec.image_size or _image_size(checkpoint))
    described: dict[str, Any] | None = None
    if architecture is not None:
        published = (
            PUBLISHED.get(architecture, {}) if spec.architecture is None else {}
        )  # the file's name means that one
        described = _description(architecture, checkpoint, clean, {**published, **(spec.options or {})})
        network = build(**described)
    else:
        network = unwrapped(make_module(spec.module))
    unused = beginnings(fit_weights(network, checkpoint))
    facts = {**checkpoint.facts, "unread": list(checkpoint.unread), "unused": unused}
    check_finite(network)
    preprocess = spec.preprocess
    if preprocess is None:
        moments = BACKDOORBENCH.get(trained_on or "")
        preprocess = None if moments is None else Normalise(*moments)
        facts["normalised_for"] = None if moments is None else trained_on
    known = {
        "architecture": described,
        "facts": facts,
        "name": checkpoint.path.stem,
        "checkpoint": str(checkpoint.path),
    }
    return behind(preprocess, network, clean, scoring, **known)


def behind(
    preprocess: Callable[[Tensor], Tensor] | None,
    network: nn.Module,
    clean: LabelledImages,
    scoring: LabelledImages | None,
    **known: Any,
) -> InfectedModel:
    """The infected model of a network behind what is done to images, if anything is.

    Raises:
        DataError: that is no such function, or does not fit the images or the network.
    """
    if preprocess is not None:
        check_preprocess(preprocess, clean.images[:2])
        network = Preprocessed(preprocess, network)
    return InfectedModel(network, clean, scoring, **known)


def find_architecture(checkpoint: Checkpoint, name: str | None) -> str:
    """The architecture of that name, or of the one that the file gives; case, ``-`` and ``_`` do not count.

    ``resnet18`` is the one for small images or ``resnet18_imagenet``, whichever has the names that the weights have.
    """
    name = name or checkpoint.facts.get("model_name")
    if name is None:
        raise ModelFileError(
            f"{checkpoint.path} holds weights alone, not an infected model of this package: say which network they belong to, "
            "with --arch NAME or --module package.module:factory (architecture= or module= in Python), and which images are "
            "clean, with --clean (clean=)"
        )
    alike = [known for known in ARCHITECTURES if _plain(known) in (_plain(name), f"{_plain(name)}imagenet")]
    if not alike:
        raise UnknownNameError("architecture", name, ARCHITECTURES, "--module takes a network of your own")
    if len(alike) == 1:
        return alike[0]
    needed = {known: _shapes(known, 2, 3, {}).keys() for known in alike}
    held = ends(checkpoint.weights, set().union(*needed.values()))
    return max(alike, key=lambda known: len(needed[known] & held))


def ends(names: Iterable[str], known: Set[str]) -> set[str]:
    """Those of the known names that others end in, such as conv1.weight of module.conv1.weight."""
    most = max((name.count(".") for name in known), default=0) + 1
    parted = ((name, name.rsplit(".", most)) for name in names)
    return {
        end
        for name, parts in parted
        for end in (name, *(".".join(parts[-count:]) for count in range(1, len(parts))))
        if end in known
    }


def make_module(factory: Factory | None) -> nn.Module:
    """A module itself, what a function or class makes, or what ``package.module:factory`` names, which is imported and run.

    The folder that the program was started in is looked in first.

    Raises:
        DataError: it cannot be imported, or gives no module.
    """
    made: Any = factory
    if isinstance(factory, str):
        name, sign, attribute = factory.partition(":")
        if not sign or not name or not attribute:
            raise DataError(f"--module takes package.module:factory, not {shown(factory)}")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            made = getattr(importlib.import_module(name), attribute)
        except Exception as error:  # the user's code, which can raise anything
            raise DataError(f"{factory} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, nn.Module) and callable(made):
        try:
            made = made()
        except Exception as error:
            raise DataError(
                f"{factory} cannot be called without arguments: {type(error).__name__}: {first_line(error)}"
            ) from error
    if not isinstance(made, nn.Module):
        raise DataError(f"{factory} must be or give a torch.nn.Module, not {type(made).__name__}")
    return made


def differing_length(first: Shapes, second: Shapes, checkpoint: Checkpoint, axis: int = 0) -> int | None:
    """How long the checkpoint's tensors are, along one axis, that have two shapes in two networks; None where it has none."""
    for key in (key for key in first if first[key] != second[key]):
        for name, tensor in checkpoint.weights.items():
            if tensor.ndim > axis and (name == key or name.endswith(f".{key}")):
                return tensor.shape[axis]
    return None


def _description(
    name: str, checkpoint: Checkpoint, clean: LabelledImages, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of the network: as many classes as the weights have, and channels, or those of the images."""
    grey, colour = (_shapes(name, 2, channels, options) for channels in (1, 3))
    channels = differing_length(grey, colour, checkpoint, axis=1)
    channels = channels if channels in (1, 3) else clean.images.shape[1]
    # Not the number that the file says: the network is built before its weights are compared.
    two, three = (_shapes(name, classes, channels, options) for classes in (2, 3))
    classes = (
        differing_length(two, three, checkpoint) or 1
    )  # which ``fit_weights`` refuses, and says what else is missing
    return {"name": name, "num_classes": classes, "in_channels": channels, **options}


def _shapes(name: str, classes: int, channels: int, options: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):  # shapes without weights
        return {key: value.shape for key, value in build(name, classes, channels, **options).state_dict().items()}


def _image_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    size = checkpoint.facts.get("img_size")
    if size is None or len(size) < 2 or not all(type(side) is int and 0 < side <= MOST_SIDE for side in size[:2]):
        return None
    return size[0], size[1]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
