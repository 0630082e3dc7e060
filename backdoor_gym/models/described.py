"""What networks that a config describes have in common: the libraries that make them, and how large they may be."""

import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..data.pictures import MOST_SIDE
from ..errors import DataError, ModelFileError, WeightsError
from ..wording import shown

CONFIG = "config.json"
#: Arguments of ``timm.create_model`` that say where weights come from (a pickle, the Hub) or what it gives instead of logits.
NOT_FROM_A_FILE = {
    "cache_dir", "checkpoint_path", "exportable", "features_only", "no_jit", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "scriptable",
}  # fmt: skip
#: Layers of a kind, pixels a side, and pixels around an image, that a config may ask for: more would take for ever before the
#: weights are compared.
MOST_LAYERS, MOST_PADDING = 1000, 64
MOST_ASKED = (
    (re.compile(r"^(?!.*(channel|dim|size|width)).*(layer|depth|block|repeat|stage)"), MOST_LAYERS),
    (re.compile(r"(image|img|input|crop)s?_?size|resolution"), MOST_SIDE),
    (re.compile(r"pad(?!_token)"), MOST_PADDING),
)
#: Numbers that a network may hold beyond twice those in its files, before it is built.
SPARE = 1 << 24


class Made(NamedTuple):
    """A network that was built, with its weights in it.

    Attributes:
        network: from what the preprocessing makes of images to logits, or an answer that holds them.
        labels: the name of each class, by its number; two may have the same.
        unread: code that the folder names and that was not touched.
        unused: tensors that the network has no place for.
        planned: the same without weights, on the meta device where it can be made there.
        prefix: see ``Layout``.
    """

    network: nn.Module
    labels: dict[int, str]
    unread: list[str]
    unused: list[str]
    planned: nn.Module
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


def check_asked(config: Any, folder: Path, key: str = "") -> None:
    """Raise ``ModelFileError`` where a config asks for more layers, or larger images, than anybody's network has."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name not in ("id2label", "label2id"):
                check_asked(value, folder, str(name))
    elif isinstance(config, list):
        if key != "label_names" and len(config) > MOST_LAYERS:
            raise ModelFileError(f"{folder / CONFIG}: {key} has {len(config)} entries; {MOST_LAYERS} is the most")
        for value in config:
            check_asked(value, folder, key)
    elif isinstance(config, int | float):
        most = min((most for names, most in MOST_ASKED if names.search(key)), default=math.inf)
        if config > most:
            raise ModelFileError(f"{folder / CONFIG}: {key} is {shown(config)}; {most} is the most")
