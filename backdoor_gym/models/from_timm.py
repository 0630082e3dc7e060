"""Networks of timm: of a folder that describes one, or of a state dict and a name."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..files.checkpoints import Checkpoint, read_checkpoint
from ..files.fitting import fit_weights
from ..files.sizes import counted
from ..networks.preprocessing import Normalise
from ..networks.weights import check_finite
from ..wording import first_line, shown
from .checkpoint_spec import CheckpointSpec
from .described import NOT_FROM_A_FILE, Made, check_asked, check_size, library
from .foreign import differing_length, load_foreign
from .image_settings import image_size, in_words, normalisation, timm_settings
from .infected import InfectedModel
from .layout import WEIGHTS


def load_timm(path: str | Path, name: str, spec: CheckpointSpec) -> InfectedModel:
    """The infected model of a state dict of timm's network of that name, normalised as timm does it unless that is given.

    Args:
        path: of the weights, in any form that ``read_checkpoint`` takes.
        name: such as ``resnet18``; its numbers of classes and channels are those of the weights.
        spec: neither an architecture nor a module; ``options`` are those of ``timm.create_model``.

    Raises:
        DataError: no such network, or timm not installed; else as ``load_foreign`` does.
    """
    if spec.architecture is not None or spec.module is not None:
        raise DataError(
            "a checkpoint belongs to a network of timm, to an architecture of this package or to a module of yours"
        )
    checkpoint = read_checkpoint(path)
    options = dict(spec.options or {})
    for key, axis in (("num_classes", 0), ("in_chans", 1)):  # the axis of the tensors that each decides
        if key not in options:
            fewer, more = (_shapes(name, {**options, key: count}) for count in (2, 3))
            length = differing_length(fewer, more, checkpoint, axis)
            options |= {} if length is None else {key: length}
    network = create(name, options)
    check_size(network, checkpoint.weights, checkpoint.path)
    settings = timm_settings({"pretrained_cfg": getattr(network, "pretrained_cfg", None) or {}})
    size = spec.image_size or image_size(settings, {}, checkpoint.path)
    preprocess, words = spec.preprocess, None
    if preprocess is None:
        preprocess = normalisation(settings, checkpoint.path)
        channels = options.get("in_chans", 3)
        if isinstance(preprocess, Normalise) and len(preprocess.mean) != channels:
            raise DataError(
                f"timm normalises {len(preprocess.mean)} channels and the network takes {channels}: say with --mean and --std "
                "(preprocess=) what it was trained with"
            )
        words = in_words(preprocess, size)
    ready = replace(spec, module=network, image_size=size, preprocess=preprocess)
    model = load_foreign(checkpoint.path, ready)
    model.facts["preprocessing"] = words
    return model


def make_timm(config: Mapping[str, Any], weights: dict[str, Tensor], folder: Path) -> Made:
    """The network of a folder whose ``config.json`` names its architecture in timm."""
    arguments = dict(config.get("model_args") or {})
    classes = config.get("num_classes", (config.get("pretrained_cfg") or {}).get("num_classes"))
    check_asked(arguments, folder)
    name = config["architecture"]
    if classes is not None:
        arguments["num_classes"] = classes
    with counted(weights):
        planned = _planned(name, arguments)
    check_size(planned, weights, folder)
    network = create(name, arguments)
    unused = fit_weights(network, Checkpoint(folder / WEIGHTS, weights, {}))
    check_finite(network)
    first = next(iter(network.state_dict()))
    prefix = next((key.removesuffix(first) for key in weights if key == first or key.endswith(f".{first}")), "")
    names = config.get("label_names")
    labels = dict(enumerate(map(str, names))) if isinstance(names, list) else {}
    return Made(network, labels, [], unused, planned, prefix)


def create(name: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of that name in timm, without weights from anywhere.

    Raises:
        DataError: no such network, or arguments that it does not take.
    """
    timm = library("timm")
    refused = sorted(NOT_FROM_A_FILE & arguments.keys())
    if refused:
        raise DataError(f"a network of timm is made without {refused[0]}: weights come out of the file alone")
    if not isinstance(name, str) or re.search(r"[:/\\]", name) or not timm.is_model(name):
        raise DataError(f"timm {timm.__version__} has no network {shown(name)}; timm.list_models() lists them")
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # arguments of a file or of a user, in any combination
        raise DataError(
            f"timm cannot make {name} with {dict(arguments)}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _planned(name: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """The network without weights, where timm can make it so."""
    try:
        with torch.device("meta"):
            return create(name, arguments)
    except DataError as error:
        # Some networks compute with numbers as they are made, which have no values there.
        if isinstance(error.__cause__, NotImplementedError | RuntimeError):
            return create(name, arguments)
        raise


def _shapes(name: str, arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in _planned(name, arguments).state_dict().items()}
