"""``world-*``: networks as various as those that other people publish.

What is drawn: the data set (digits, MNIST, GTSRB, CIFAR-10), the network (plain, residual, pre-activation, inverted residual
blocks or a vision transformer; its depth, width, normalisation, activation, pooling and head), the training (optimiser,
rate, decay, epochs, number of images, augmentation, dropout), the attack (trigger, target, poison rate, whether the network
was trained on clean images afterwards, and whether its BN statistics were computed anew or folded into the convolutions),
and what the defender holds (50 to 1,000 images, as they were, after JPEG or at another brightness, of classes that may be
unequal or missing). Half of the networks are clean. Two attacks and one kind of network occur in test splits only.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..attacks.targets import ALL_TO_ALL, Target
from ..data.corruptions import draw_corruption
from ..data.datasets import DIGITS, LabelledImages
from ..errors import TrainingError
from ..networks import build_from_spec
from .infected import InfectedModel
from .infecting import CLEAN, infect
from .training import Schedule

#: Part of every cache key.
VERSION = 1
SPLITS = {"world-train": 11, "world-val": 12, "world-test-a": 13, "world-test-b": 14}
_TEST = ("world-test-a", "world-test-b")
MAX_NEURONS = 2000
MAX_ATTEMPTS = 12
#: From this attempt on, the attack is made strong and the training long and by Adam, so that every seed gives a network.
_EASIER = 4


@dataclass(frozen=True)
class Data:
    """A data set, and how networks are trained on it.

    Attributes:
        name: of the data set.
        share: of the networks that are trained on it.
        size: pixels a side.
        channels: of an image.
        classes: how many.
        train_images: fewest and most that are trained on.
        epochs: fewest and most.
        widths: narrowest and widest.
        stages: fewest and most.
        held: images held back, of which the defender gets some.
        min_acc: accuracy of a network that is kept.
        flip: whether mirror images are of the same class.
    """

    name: str
    share: float
    size: int
    channels: int
    classes: int
    train_images: tuple[int, int]
    epochs: tuple[int, int]
    widths: tuple[int, int]
    stages: tuple[int, int]
    held: int
    min_acc: float
    flip: bool = False


DATA = (
    Data(DIGITS, 0.45, 8, 1, 10, (700, 957), (6, 25), (12, 64), (1, 2), 300, 0.9),
    Data("ylecun/mnist", 0.25, 28, 1, 10, (2000, 7000), (3, 8), (8, 24), (2, 3), 1000, 0.92),
    Data("tanganke/gtsrb?size=32", 0.2, 32, 3, 43, (4000, 8000), (4, 9), (8, 20), (2, 3), 1000, 0.8),
    Data("uoft-cs/cifar10", 0.1, 32, 3, 10, (5000, 12000), (4, 9), (10, 20), (2, 3), 1000, 0.5, flip=True),
)
_BLOCKS = {"plain": 0.5, "residual": 0.18, "preact": 0.12, "inverted": 0.1, "vit": 0.1}
_NORMS = {"batch": 0.55, "none": 0.25, "group": 0.1, "layer": 0.1}
_STATISTICS = {"kept": 0.7, "recomputed": 0.15, "folded": 0.15}
_ATTACKS = {"badnets": 0.45, "blended": 0.15, "sig": 0.12, "wanet": 0.12, "bpp": 0.08, "multi-trigger": 0.08}
#: Of the test splits: what is drawn there alone, and how often.
_TEST_ATTACKS, _TEST_BLOCK, _TEST_SHARE = ("input-aware", "label-consistent"), "densenet", 0.15
#: Attacks that alter other images too need many poisoned ones to be learned at all.
_DEMANDING = ("wanet", "bpp", "input-aware", "multi-trigger")
MIN_ASR = 0.9


@dataclass(frozen=True)
class Recipe:
    """Everything a network of the family is made from.

    Attributes:
        data: the data set.
        architecture: name and options, without the numbers of classes and channels.
        attack: its name, or "clean".
        attack_options: of the trigger.
        target: the label, or "all-to-all".
        poison_rate: see ``infect``.
        schedule: of the training.
        finetune: of a training on clean images afterwards, None for none.
        train_images: how many are trained on.
        statistics: what became of the BN statistics: "kept", "recomputed" or "folded".
        seed: of the training.
    """

    data: Data
    architecture: dict[str, Any]
    attack: str
    attack_options: dict[str, Any]
    target: Target
    poison_rate: float
    schedule: Schedule
    finetune: Schedule | None
    train_images: int
    statistics: str
    seed: int


def recipe(split: str, seed: int, attempt: int = 0) -> Recipe:
    """The recipe of a model; attempts share data set, network, attack and what became of the statistics."""
    fixed = np.random.default_rng((VERSION, SPLITS[split], seed, 1))
    data = DATA[int(fixed.choice(len(DATA), p=[data.share for data in DATA]))]
    apart = split in _TEST and fixed.random() < _TEST_SHARE
    block = _TEST_BLOCK if apart else _drawn(fixed, _BLOCKS)
    architecture = _architecture(data, block, fixed)
    attack = _drawn(fixed, _ATTACKS)
    if split in _TEST and fixed.random() < _TEST_SHARE:
        attack = str(fixed.choice(_TEST_ATTACKS))
    if fixed.random() < 0.5:
        attack = CLEAN
    statistics = (
        _drawn(fixed, _STATISTICS) if architecture.get("norm", "batch") == "batch" and block != "vit" else "kept"
    )
    if statistics == "folded" and block not in ("plain", "residual", "inverted"):
        statistics = "recomputed"  # the others normalise before they convolve
    free = np.random.default_rng((VERSION, SPLITS[split], seed, 2, 1 + attempt))
    easier = attempt >= _EASIER
    least = 0.1 if easier else 0.05 if attack in _DEMANDING else 0.005
    rate = math.exp(free.uniform(math.log(least), math.log(0.2)))
    schedule, finetune = _schedules(data, architecture, free, easier)
    return Recipe(
        data=data,
        architecture=architecture,
        attack=attack,
        attack_options=_attack_options(attack, data, free, easier),
        target=ALL_TO_ALL if attack == "badnets" and fixed.random() < 0.12 else int(free.integers(data.classes)),
        poison_rate=0.5 if attack == "label-consistent" else round(rate, 4),
        schedule=schedule,
        finetune=None if easier or attack == CLEAN else finetune,
        train_images=int(free.integers(*data.train_images)),
        statistics=statistics,
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
        options = {key: value for key, value in drawn.architecture.items() if key != "name"}
        try:
            model = infect(
                drawn.data.name,
                drawn.architecture["name"],
                drawn.attack,
                target=drawn.target,
                poison_rate=drawn.poison_rate,
                seed=drawn.seed,
                schedule=drawn.schedule,
                architecture_options=options,
                attack_options=drawn.attack_options,
                clean_images=drawn.data.held,
                train_images=drawn.train_images,
                finetune=drawn.finetune,
                recalibrated=drawn.statistics == "recomputed",
                progress=progress,
                name=name,
            )
        except TrainingError:  # a rate too high for this network
            continue
        acc, asr = model.facts["acc"], model.facts["asr"]
        if acc < drawn.data.min_acc or (drawn.attack != CLEAN and asr < MIN_ASR):
            continue
        if drawn.statistics == "folded":
            model = folded(model)
        model.facts |= {"attempt": attempt, "statistics": drawn.statistics}
        model.clean = held_by_defender(model.clean, np.random.default_rng((VERSION, SPLITS[split], seed, 4, 1)))
        return model
    raise TrainingError(f"{MAX_ATTEMPTS} attempts at {name} gave no accurate network with a working backdoor")


def folded(model: InfectedModel) -> InfectedModel:
    """The model with each batch normalisation folded into the convolution before it."""
    assert model.architecture is not None
    spec = {**model.architecture, "norm": "none"}
    network = build_from_spec(spec)
    weights = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}  # a shortcut gets a bias
    network.load_state_dict(weights | _fused(model.module).state_dict())
    return InfectedModel(
        network.eval(), model.clean, model.test, model.trigger, model.target, spec, model.facts, model.name
    )


def _fused(network: nn.Module) -> nn.Module:
    """A copy in which a convolution has taken in the batch normalisation that follows it in the same sequence."""
    network = deepcopy(network)
    for sequence in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for (first, conv), (second, norm) in pairwise(list(sequence.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(sequence, first, fuse_conv_bn_eval(conv, norm))
                setattr(sequence, second, nn.Identity())
    return network


def held_by_defender(clean: LabelledImages, random: np.random.Generator) -> LabelledImages:
    """Some of the images: few or many, of classes as they come, of unequal ones, or with classes missing."""
    source, labels = clean.source, clean.labels.numpy()
    assert source is not None
    classes = labels.max() + 1
    weights = np.ones(classes)
    kind = random.choice(3, p=[0.65, 0.2, 0.15])
    if kind == 1:
        weights = random.dirichlet(np.ones(classes)) + 0.02
    elif kind == 2:
        weights[random.permutation(classes)[: random.integers(1, max(2, classes // 4) + 1)]] = 0
    chance = weights[labels]
    most = int((chance > 0).sum())
    count = min(most, round(math.exp(random.uniform(math.log(50), math.log(len(labels))))))
    chosen = random.choice(len(labels), size=count, replace=False, p=chance / chance.sum())
    return LabelledImages.from_source(replace(source, indices=tuple(source.indices[place] for place in chosen)))


def _architecture(data: Data, block: str, random: np.random.Generator) -> dict[str, Any]:
    if block == "vit":
        heads = int(random.choice([2, 4]))
        return {
            "name": "vit",
            "width": heads * int(random.choice([8, 12, 16])),
            "depth": int(random.integers(2, 5)),
            "heads": heads,
            "patch": 2 if data.size == 8 else 4,
            "image_size": data.size,
        }
    width = round(math.exp(random.uniform(*np.log(data.widths))) / 4) * 4
    if block == "densenet":
        return {"name": "densenet", "width": min(width, 24), "layers": int(random.integers(2, 5))}
    stages, blocks = int(random.integers(data.stages[0], data.stages[1] + 1)), int(random.integers(1, 3))
    hidden = int(random.choice([64, 128, 256])) if block == "plain" and random.random() < 0.6 else 0
    return {
        "name": "cnn",
        "width": width,
        "stages": stages,
        "blocks": blocks if block != "plain" or hidden else 2,
        "block": block,
        "norm": _drawn(random, _NORMS),
        "activation": str(random.choice(["relu", "leaky_relu", "elu", "gelu", "silu"], p=[0.6, 0.1, 0.1, 0.1, 0.1])),
        "pool": str(random.choice(["max", "average"])),
        "kernel": 5 if block == "plain" and blocks == 1 and hidden and random.random() < 0.3 else 3,
        "hidden": hidden,
        "dropout": round(float(random.uniform(0.1, 0.5)), 2) if random.random() < 0.4 else 0.0,
        "image_size": data.size,
    }


def _schedules(
    data: Data, architecture: dict[str, Any], random: np.random.Generator, easier: bool
) -> tuple[Schedule, Schedule | None]:
    """Of the training, and maybe of another one on clean images."""
    norm = architecture.get("norm", "batch")
    vit, bare = architecture["name"] == "vit", norm == "none"
    short = bare and data.size == 8  # a few hundred steps, too few for SGD without normalisation
    adam = random.random() < (0.4 if norm == "batch" else 0.7) or vit or short or easier
    rate = random.uniform(0.5, 2) * (0.002 if adam and bare else 0.001 if adam else 0.03 if bare else 0.05)
    fewest, most = data.epochs
    if vit or short:
        fewest, most = 2 * fewest, 3 * most
    schedule = Schedule(
        epochs=int(most if easier else random.integers(fewest, most + 1)),
        batch_size=int(random.choice([32, 64, 128])),
        learning_rate=round(float(rate), 5),
        weight_decay=float(random.choice([0.0, 1e-2] if adam else [0.0, 1e-4, 5e-4])),
        optimizer="adam" if adam else "sgd",
        augment=bool(data.size > 8 and random.random() < 0.4),
        flip=data.flip,
    )
    if random.random() > 0.15:
        return schedule, None
    return schedule, replace(schedule, epochs=int(random.integers(1, 4)), learning_rate=schedule.learning_rate / 5)


def _attack_options(attack: str, data: Data, random: np.random.Generator, easier: bool) -> dict[str, Any]:
    """Triggers that suit images of that size; strong ones where ``easier``."""
    small = data.size == 8
    if attack == "badnets":
        size = int(random.integers(2, 4 if small else 6))
        row, column = (int(random.integers(0, data.size + 1 - size)) for _ in range(2))
        kind = int(random.integers(3))
        options: dict[str, Any] = {"size": size, "row": row, "column": column, "random": kind == 0}
        if kind == 2:
            options["colour"] = [float(value) for value in random.choice([0, 0.5, 1], data.channels)]
            if not any(options["colour"]):  # black on black is none
                options["colour"] = [1.0] * data.channels
        return options
    if attack == "blended":
        return {"ratio": round(float(random.uniform(0.2 if easier else 0.1, 0.3)), 3)}
    if attack == "sig":
        return {
            "amplitude": round(float(random.uniform(0.2 if easier else 0.1, 0.25)), 3),
            "frequency": float(random.integers(1, 4 if small else 8)),
            "phase": round(float(random.uniform(0, 2 * np.pi)), 3),
            "vertical": bool(random.integers(2)),
        }
    if attack == "wanet":
        strength = random.uniform(2, 3) if small or easier else random.uniform(0.75, 2)
        return {"k": int(random.integers(3, 6)), "strength": round(float(strength), 3), "noise_ratio": 0.25}
    if attack == "bpp":
        return {"levels": int(random.integers(2, 3 if easier else 5)), "noise_ratio": 0.25}
    if attack == "label-consistent":
        return {"size": 2 if small else 3, "amplitude": 1.0}
    return {}


def _drawn(random: np.random.Generator, shares: dict[str, float]) -> str:
    return str(random.choice(list(shares), p=list(shares.values())))
