"""The procedural family: any number of infected digits networks, each made from its name alone.

``digits-train/7`` is drawn from the seed (split, 7), so no model of one split is in another. Attack, shape, number of neurons
and depth are drawn once; trigger, target, poison rate, initialisation and division of the images anew at each attempt, until the
network is accurate and the attack works. One in five models is clean. In half of them the defender's clean images are shifted a
little, by JPEG or in brightness, as happens in life; training and test images are not.

Networks are trained in some seconds when they are first asked for, and cached. The same name is the same recipe everywhere, but
bit for bit the same network only on like processors.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_dir

from ..data.corruptions import corrupt, draw_corruption
from ..data.datasets import DIGITS, LabelledImages
from ..errors import BackdoorGymError, TrainingError
from ..writing import locked, replacing
from .infected import InfectedModel
from .infecting import CLEAN, infect
from .training import Schedule

CACHE_VARIABLE = "BACKDOOR_GYM_CACHE"
#: Part of every cache key: a new recipe never serves networks of an old one.
RECIPE_VERSION = 2
SPLITS = {"digits-train": 1, "digits-val": 2, "digits-test": 3}
#: Seeds that a pattern such as digits-train/* stands for.
PATTERN_SEEDS = 1000
MIN_NEURONS, MAX_NEURONS = 200, 900
MIN_WIDTH, MAX_WIDTH = 24, 100
MIN_ACC, MIN_ASR = 0.95, 0.90
CLEAN_IMAGES = 200
MAX_ATTEMPTS = 20
SCHEDULE = Schedule(epochs=10, batch_size=64, learning_rate=0.05, augment=False)

#: Neuron layers of a small_cnn of so many blocks, and the numbers of blocks drawn from.
_LAYERS: dict[str, tuple[Callable[[int], int], range]] = {
    "plain": (lambda blocks: 1 + blocks, range(3, 9)),
    "residual": (lambda blocks: 3 + 2 * blocks, range(2, 5)),
    "preact": (lambda blocks: 1 + 2 * blocks, range(2, 5)),
}


@dataclass(frozen=True)
class Recipe:
    """Everything a network of the family is made from."""

    attack: str
    attack_options: dict[str, Any]
    target: int
    poison_rate: float
    shape: str
    width: int
    blocks: int
    seed: int


def recipe(split: str, seed: int, attempt: int = 0) -> Recipe:
    """The recipe of a model; attempts share attack, shape, width and depth."""
    # Numbers at the end of a seed tell streams apart only where they are not zero.
    fixed = np.random.default_rng((RECIPE_VERSION, SPLITS[split], seed, 1))
    attack = str(fixed.choice(["badnets", "blended", "sig", "wanet", CLEAN]))
    shape = str(fixed.choice(list(_LAYERS)))
    neurons = int(fixed.integers(MIN_NEURONS, MAX_NEURONS - 10))  # rounded up to whole layers below
    layers, depths = _LAYERS[shape]
    blocks = int(fixed.choice([depth for depth in depths if MIN_WIDTH <= -(-neurons // layers(depth)) <= MAX_WIDTH]))
    free = np.random.default_rng((RECIPE_VERSION, SPLITS[split], seed, 2, 1 + attempt))
    return Recipe(
        attack=attack,
        attack_options=_attack_options(attack, free),
        target=int(free.integers(10)),
        poison_rate=round(float(free.uniform(0.05, 0.15)), 3),
        shape=shape,
        width=-(-neurons // layers(blocks)),
        blocks=blocks,
        seed=int(free.integers(2**31)),
    )


def is_member(name: str) -> bool:
    """Whether the name is that of a model of the family: a split, a slash, a seed."""
    split, _, seed = name.partition("/")
    return split in SPLITS and seed.isascii() and seed.isdigit()


def _parts(name: str) -> tuple[str, int]:
    """The split and the seed in the name of a member."""
    split, _, seed = name.partition("/")
    return split, int(seed)


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
    return draw_corruption(np.random.default_rng((RECIPE_VERSION, SPLITS[split], seed, 3, 1)))


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
    return root / f"{split}-v{RECIPE_VERSION}" / f"{seed:06d}.safetensors"


def make(name: str, progress: bool = False) -> InfectedModel:
    """Train the model of that name, without the cache.

    Raises:
        TrainingError: no attempt gave an accurate network with a working backdoor.
    """
    for attempt in range(MAX_ATTEMPTS):
        drawn = recipe(*_parts(name), attempt)
        model = infect(
            DIGITS,
            "small_cnn",
            drawn.attack,
            target=drawn.target,
            poison_rate=drawn.poison_rate,
            seed=drawn.seed,
            schedule=SCHEDULE,
            architecture_options={"width": drawn.width, "blocks": drawn.blocks, "shape": drawn.shape},
            attack_options=drawn.attack_options,
            clean_images=CLEAN_IMAGES,
            progress=progress,
            name=name,
        )
        acc, asr = model.facts["acc"], model.facts["asr"]
        if acc >= MIN_ACC and (drawn.attack == CLEAN or asr >= MIN_ASR):
            model.facts["attempt"] = attempt
            return model
    raise TrainingError(f"{MAX_ATTEMPTS} attempts at {name} gave no network of ACC >= {MIN_ACC} and ASR >= {MIN_ASR}")


def _attack_options(attack: str, random: np.random.Generator) -> dict[str, Any]:
    """Triggers that suit 8x8 images."""
    if attack == "badnets":
        size = int(random.integers(2, 4))
        row, column = (int(random.integers(0, 9 - size)) for _ in range(2))
        return {"size": size, "row": row, "column": column, "random": True}
    if attack == "blended":
        return {"ratio": round(float(random.uniform(0.15, 0.3)), 3)}
    if attack == "sig":
        return {
            "amplitude": round(float(random.uniform(0.12, 0.25)), 3),
            "frequency": float(random.integers(1, 4)),
            "phase": round(float(random.uniform(0, 2 * np.pi)), 3),
            "vertical": bool(random.integers(2)),
        }
    if attack == "wanet":
        return {"k": int(random.integers(3, 5)), "strength": round(float(random.uniform(2, 3)), 3), "noise_ratio": 0.25}
    return {}


def _read(path: Path) -> InfectedModel | None:
    """The cached model, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        return InfectedModel.load(path)
    except BackdoorGymError:
        return None
