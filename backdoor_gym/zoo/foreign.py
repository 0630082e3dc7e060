"""Infected models out of other people's checkpoints: weights, the network they belong to, and clean images."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_kind, check_options
from ..errors import DataError, ModelFileError, UnknownNameError
from ..infected import InfectedModel, check_finite, check_preprocess
from .adapting import unwrapped
from .architectures import ARCHITECTURES, build
from .checkpoints import Checkpoint, beginnings, fit_weights, read_checkpoint
from .datasets import MOST_SIDE
from .own_images import OwnImages, Source, all_images, own_images
from .preprocessing import Normalise, Preprocessed

Factory = str | nn.Module | Callable[[], nn.Module]

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
PUBLISHED_VGG = {"batch_norm": False, "hidden": 4096}
OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), PUBLISHED_VGG)


def load_foreign(
    path: str | Path,
    *,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    module: Factory | None = None,
    clean: Source | None = None,
    test: Source | None = None,
    clean_images: int | None = None,
    image_size: tuple[int, int] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> InfectedModel:
    """The infected model of a checkpoint that this package did not write. Nothing that came with it is run.

    Args:
        path: ``.safetensors``, or a torch file (``.pt``, ``.pth``, ``.tar``) with a state dict in it; BackdoorBench's
            ``attack_result.pt`` says itself which architecture, image size and normalisation it wants.
        architecture: one of ``ARCHITECTURES``; its number of classes is that of the weights.
        options: of the architecture, such as ``{"width": 16}``.
        module: instead of an architecture, your own network: a module, a function or class that makes one, or
            ``"package.module:factory"``, which imports and runs that code of yours.
        clean: the defender's images, in any form that ``own_images`` takes: neither training images of the network nor test
            images.
        test: images to score on; by default the rest of a named data set, and none otherwise.
        clean_images: how many of ``clean`` are drawn; by default 500 of a named data set, and all otherwise.
        image_size: height and width that the images of folders are resized to.
        preprocess: from images in [0, 1] to what the network takes (see ``InfectedModel.from_module``).

    Raises:
        ModelFileError: a file without weights, or one whose network is not said.
        WeightsError: weights that do not fit the network.
        DataError: clean images missing, or images that do not fit.
        UnknownNameError: no such architecture.
    """
    check_kind("architecture", architecture, str, "a name", may_be_none=True)
    check_options("options", options)
    checkpoint = read_checkpoint(path)
    if architecture is not None and module is not None:
        raise DataError("a checkpoint belongs to an architecture of this package or to a module of yours, not to both")
    published: Mapping[str, Any] = {}
    if module is None:
        found = find_architecture(checkpoint, architecture)
        published = OPTIONS.get(found, {}) if architecture is None else {}  # the file's name means the published one
        architecture = found
    if clean is None:
        said = checkpoint.facts.get("clean_data")
        hint = f" (the file says that it was trained on {said})" if said else ""
        raise DataError(
            f"{checkpoint.path} brings no images: name clean ones with --clean (clean=), the .npz, the folder or the data set "
            f"that they are in{hint}"
        )
    image_size = image_size or _image_size(checkpoint)
    images = own_images(clean, clean_images, image_size)
    scoring = images.rest if test is None else all_images(test, image_size)
    spec: dict[str, Any] | None = None
    if architecture is not None:
        spec = _spec(architecture, checkpoint, images, {**published, **(options or {})})
        network = build(**spec)
    elif module is not None:
        network = unwrapped(make_module(module))
    unused = beginnings(fit_weights(network, checkpoint))
    facts = {**checkpoint.facts, "unread": list(checkpoint.unread), "unused": unused}
    check_finite(network)
    full: nn.Module = network
    if preprocess is None:
        preprocess = _normalisation(checkpoint)
        facts["normalised_for"] = None if preprocess is None else checkpoint.facts["clean_data"]
    if preprocess is not None:
        check_preprocess(preprocess, images.images.images[:2])
        full = Preprocessed(preprocess, network)
    path = checkpoint.path
    return InfectedModel(
        full, images.images, scoring, architecture=spec, facts=facts, name=path.stem, checkpoint=str(path)
    )


def find_architecture(checkpoint: Checkpoint, name: str | None) -> str:
    """The architecture of that name, or of the one that the file gives; case, ``-`` and ``_`` do not count.

    ``resnet18`` is the one for small images or ``resnet18_imagenet``, whichever has the names that the weights have.
    """
    wanted = name or checkpoint.facts.get("model_name")
    if wanted is None:
        raise ModelFileError(
            f"{checkpoint.path} holds weights alone, not an infected model of this package: say which network they belong to, "
            "with --arch NAME or --module package.module:factory (architecture= or module= in Python), and which images are "
            "clean, with --clean (clean=)"
        )
    alike = [known for known in ARCHITECTURES if _plain(known) in (_plain(wanted), f"{_plain(wanted)}imagenet")]
    if not alike:
        raise UnknownNameError("architecture", wanted, ARCHITECTURES, "--module takes a network of your own")
    return max(alike, key=lambda known: len(_shapes(known, 2, 3).keys() & _last_parts(checkpoint)))


def make_module(factory: Factory) -> nn.Module:
    """A module itself, what a function or class makes, or what ``package.module:factory`` names, which is imported and run.

    The folder that the program was started in is looked in first.

    Raises:
        DataError: it cannot be imported, or gives no module.
    """
    made: Any = factory
    if isinstance(factory, str):
        name, sign, attribute = factory.partition(":")
        if not sign or not name or not attribute:
            raise DataError(f"--module takes package.module:factory, not {factory!r}")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            made = getattr(importlib.import_module(name), attribute)
        except Exception as error:  # the user's code, which can raise anything
            raise DataError(f"{factory} cannot be imported: {_reason(error)}") from error
    if not isinstance(made, nn.Module) and callable(made):
        try:
            made = made()
        except Exception as error:
            raise DataError(f"{factory} cannot be called without arguments: {_reason(error)}") from error
    if not isinstance(made, nn.Module):
        raise DataError(f"{factory} must be or give a torch.nn.Module, not {type(made).__name__}")
    return made


def _spec(name: str, checkpoint: Checkpoint, images: OwnImages, options: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the network: as many classes as the weights have, and channels, or those of the images."""
    grey, colour = (_shapes(name, 2, channels, **options) for channels in (1, 3))
    channels = differing_length(grey, colour, checkpoint, axis=1)
    channels = channels if channels in (1, 3) else images.images.images.shape[1]
    # Not the number that the file says: the network is built before its weights are compared.
    classes = _classes(name, checkpoint, channels, options)
    return {"name": name, "num_classes": classes, "in_channels": channels, **options}


def _classes(name: str, checkpoint: Checkpoint, channels: int, options: Mapping[str, Any]) -> int:
    """How long the tensors are whose length the number of classes decides."""
    two, three = (_shapes(name, classes, channels, **options) for classes in (2, 3))
    return differing_length(two, three, checkpoint) or 1  # which ``fit_weights`` refuses, and says what else is missing


def differing_length(
    one: Mapping[str, torch.Size], other: Mapping[str, torch.Size], checkpoint: Checkpoint, axis: int = 0
) -> int | None:
    """How long the checkpoint's tensors are, along one axis, that have two shapes in two networks; None where it has none."""
    for key in (key for key in one if one[key] != other[key]):
        for found, tensor in checkpoint.weights.items():
            if tensor.ndim > axis and (found == key or found.endswith(f".{key}")):
                return tensor.shape[axis]
    return None


def _shapes(name: str, classes: int, channels: int, **options: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):  # shapes without weights
        return {key: value.shape for key, value in build(name, classes, channels, **options).state_dict().items()}


def _last_parts(checkpoint: Checkpoint) -> set[str]:
    """All ends of the names in the file, such as ``conv1.weight`` of ``module.conv1.weight``."""
    return {".".join(name.split(".")[start:]) for name in checkpoint.weights for start in range(name.count(".") + 1)}


def _image_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    size = checkpoint.facts.get("img_size")
    if size is None or len(size) < 2 or not all(type(side) is int and 0 < side <= MOST_SIDE for side in size[:2]):
        return None
    return size[0], size[1]


def _normalisation(checkpoint: Checkpoint) -> Normalise | None:
    """What BackdoorBench does to images of the data set that the file names."""
    known = BACKDOORBENCH.get(checkpoint.facts.get("clean_data", ""))
    return None if known is None else Normalise(*known)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
