"""``digits-*``: networks of one recipe on 8x8 digits, quick to make.

Attack, shape, number of neurons and depth are drawn once; trigger, target, poison rate, initialisation and division of the
images anew at each attempt, until the network is accurate and the attack works. One in five models is clean. In half of them
the defender's clean images are shifted a little, by JPEG or in brightness, as happens in life; training and test images are not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.corruptions import draw_corruption
from ..data.datasets import DIGITS
from ..errors import TrainingError
from .infected import InfectedModel
from .infecting import CLEAN, infect
from .training import Schedule

#: Part of every cache key: a new recipe never serves networks of an old one.
VERSION = 2
SPLITS = {"digits-train": 1, "digits-val": 2, "digits-test": 3}
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
    fixed = np.random.default_rng((VERSION, SPLITS[split], seed, 1))
    attack = str(fixed.choice(["badnets", "blended", "sig", "wanet", CLEAN]))
    shape = str(fixed.choice(list(_LAYERS)))
    neurons = int(fixed.integers(MIN_NEURONS, MAX_NEURONS - 10))  # rounded up to whole layers below
    layers, depths = _LAYERS[shape]
    blocks = int(fixed.choice([depth for depth in depths if MIN_WIDTH <= -(-neurons // layers(depth)) <= MAX_WIDTH]))
    free = np.random.default_rng((VERSION, SPLITS[split], seed, 2, 1 + attempt))
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


def corruption(split: str, seed: int) -> dict[str, Any]:
    """What happened to the clean images of that model: kind and level."""
    return draw_corruption(np.random.default_rng((VERSION, SPLITS[split], seed, 3, 1)))


def make(split: str, seed: int, progress: bool = False) -> InfectedModel:
    """Train the model of that split and seed, its clean images as they were.

    Raises:
        TrainingError: no attempt gave an accurate network with a working backdoor.
    """
    name = f"{split}/{seed}"
    for attempt in range(MAX_ATTEMPTS):
        drawn = recipe(split, seed, attempt)
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
