"""The procedural families: any number of infected networks, each made from its name alone.

``digits-train/7`` is drawn from the seed (split, 7), so no model of one split is in another. Networks are trained when they are
first asked for, and cached. The same name is the same recipe everywhere, but bit for bit the same network only on like
processors, and where it is made of other data sets than digits, with the same copy of them.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from platformdirs import user_cache_dir

from ..data.corruptions import corrupt
from ..data.datasets import LabelledImages
from ..errors import BackdoorGymError
from ..writing import locked, replacing
from . import digits_family, world_family
from .infected import InfectedModel

CACHE_VARIABLE = "BACKDOOR_GYM_CACHE"
#: The family that each split belongs to.
SPLITS: dict[str, ModuleType] = {split: family for family in (digits_family, world_family) for split in family.SPLITS}
#: Seeds that a pattern such as digits-train/* stands for.
PATTERN_SEEDS = 1000


def is_member(name: str) -> bool:
    """Whether the name is that of a model of a family: a split, a slash, a seed."""
    split, _, seed = name.partition("/")
    return split in SPLITS and seed.isascii() and seed.isdigit()


def max_neurons(name: str) -> int:
    """The most neurons that a member of that name can have."""
    return int(SPLITS[_parts(name)[0]].MAX_NEURONS)


def load(name: str, progress: bool = False) -> InfectedModel:
    """The model of that name, from the cache or made now.

    Processes that ask for the same one at the same time make it once. A file that is damaged is made again.

    Raises:
        TrainingError: no attempt gave an accurate network with a working backdoor.
        WriteError: the cache cannot be written.
    """
    path = cache_path(name)
    model = _read(path)
    if model is None:
        with locked(path):
            model = _read(path)  # maybe another process has made it
            if model is None:
                make(name, progress).save(path)
                model = InfectedModel.load(path)  # of the same bits, and order in memory, as it has from now on
    return corrupted(model, **corruption(name))


def make(name: str, progress: bool = False) -> InfectedModel:
    """Train the model of that name, without the cache.

    Raises:
        TrainingError: no attempt gave an accurate network with a working backdoor.
    """
    split, seed = _parts(name)
    model: InfectedModel = SPLITS[split].make(split, seed, progress)
    return model


def keep(name: str, content: bytes) -> None:
    """Put the file of a model that was made elsewhere into the cache, if it is not there."""
    path = cache_path(name)
    with locked(path):
        if not path.is_file():
            with replacing(path) as place:
                place.write_bytes(content)


def corruption(name: str) -> dict[str, Any]:
    """What happened to the clean images of that model: kind and level."""
    split, seed = _parts(name)
    drawn: dict[str, Any] = SPLITS[split].corruption(split, seed)
    return drawn


def corrupted(model: InfectedModel, kind: str, level: float) -> InfectedModel:
    """The model with the defender's clean images after a corruption (see ``corrupt``); its test images stay as they are."""
    if kind == "none":
        return model
    clean = LabelledImages(corrupt(model.clean.images, kind, level), model.clean.labels)
    facts = {**model.facts, "corruption": kind, "corruption_level": level}
    return InfectedModel(
        model.network, clean, model.test, model.trigger, model.target, model.architecture, facts, model.name
    )


def cache_path(name: str) -> Path:
    """Where the model is cached; the variable ``BACKDOOR_GYM_CACHE`` moves the folder."""
    split, seed = _parts(name)
    root = Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("backdoor-gym"))
    return root / f"{split}-v{SPLITS[split].VERSION}" / f"{seed:06d}.safetensors"


def _parts(name: str) -> tuple[str, int]:
    """The split and the seed in the name of a member."""
    split, _, seed = name.partition("/")
    return split, int(seed)


def _read(path: Path) -> InfectedModel | None:
    """The cached model, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        return InfectedModel.load(path)
    except BackdoorGymError:
        return None
