"""What networks that a config describes have in common: the libraries that make them, and how large they may be."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import DataError, ModelFileError, WeightsError

CONFIG = "config.json"
#: Arguments of ``timm.create_model`` that say where weights come from (a pickle, the Hub) or what it gives instead of logits.
NOT_FROM_A_FILE = {
    "cache_dir", "checkpoint_path", "exportable", "features_only", "no_jit", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "scriptable",
}  # fmt: skip
#: Layers of a kind that a config may ask for: more would take for ever before their weights are compared.
MOST_LAYERS = 1000
#: Numbers that a network may hold beyond twice those in its files, before it is built.
SPARE = 1 << 24


class Made(NamedTuple):
    """A network that was built, with its weights in it.

    Attributes:
        network: from what the preprocessing makes of images to logits, or an answer that holds them.
        labels: the name of each class, by its number; two may have the same.
        unread: code that the folder names and that was not touched.
        unused: tensors that the network has no place for.
        prefix: see ``Layout``.
    """

    network: nn.Module
    labels: dict[int, str]
    unread: list[str]
    unused: list[str]
    prefix: str = ""


def library(name: str) -> Any:
    """A library of an extra, imported when it is needed.

    Raises:
        DataError: not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "timm" if name == "timm" else "transformers"
        raise DataError(f"this needs {name} ({error}): pip install 'backdoor-gym[{extra}]'") from error


def check_size(network: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Raise ``WeightsError`` where a network is described as far larger than what there is of it."""
    held = {id(value): value.numel() for value in (*network.parameters(), *network.buffers())}
    described, there = sum(held.values()), sum(value.numel() for value in weights.values())
    if described > 2 * there + SPARE:
        raise WeightsError(f"{where} describes a network of {described:,} numbers and holds {there:,}")


def check_depth(config: Any, folder: Path, key: str = "") -> None:
    """Raise ``ModelFileError`` where a config asks for more layers than anybody's network has."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name not in ("id2label", "label2id"):
                check_depth(value, folder, str(name))
    elif isinstance(config, list):
        for value in config:
            check_depth(value, folder, key)
    elif (
        isinstance(config, int | float)
        and config > MOST_LAYERS
        and re.search("layer|depth|block|repeat|stage", key)
        and not re.search("channel|dim|size|width", key)
    ):
        raise ModelFileError(f"{folder / CONFIG}: {key} is {config}; {MOST_LAYERS} is the most")
