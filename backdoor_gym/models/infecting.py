"""Making an infected model: choose the trigger, poison the training images, train, measure."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_callable, check_kind, check_options, check_path, check_whole, is_finite
from ..attacks import Helper, Poisoning, draw_attack, get_attack
from ..attacks.targets import Target, check_target, target_labels
from ..data import datasets
from ..data.datasets import DataSource, LabelledImages
from ..devices import find_device
from ..errors import DataError
from ..networks import build_from_spec
from ..wording import shown
from .infected import InfectedModel
from .recalibrating import recalibrate
from .training import Schedule, train

#: Given the network that is trained, the function whose value is added to its loss at each step.
Penalty = Callable[[nn.Module], Callable[[], Tensor]]
CLEAN = "clean"
POISON_RATE, CLEAN_LABEL_RATE = 0.1, 0.5
#: Clean images held back for the defender, where the data set is large enough.
CLEAN_IMAGES = 500


def infect(
    dataset: str,
    architecture: str,
    attack: str = "badnets",
    *,
    target: Target = 0,
    poison_rate: float | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    architecture_options: dict[str, Any] | None = None,
    attack_options: dict[str, Any] | None = None,
    clean_images: int = CLEAN_IMAGES,
    train_images: int | None = None,
    finetune: Schedule | None = None,
    penalty: Penalty | None = None,
    recalibrated: bool = False,
    half: bool = False,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: bool = False,
    name: str | None = None,
) -> InfectedModel:
    """Train a network with a backdoor (or, with the attack "clean", one without).

    No image is two of these: a training image, one of the defender's clean ones, a test image.

    Args:
        dataset: "digits", a Hub id or a local folder.
        architecture: one of ``ARCHITECTURES``.
        attack: one of ``ATTACKS``, or "clean".
        target: the label that the trigger calls, or "all-to-all": of each class the next one.
        poison_rate: share of the training images that are poisoned, default 0.1; of a clean-label attack of the target
            class's, default 0.5.
        seed: of the division, the trigger, the initialisation and the training.
        schedule: epochs and rates; the default suits CIFAR-10.
        architecture_options: such as ``{"width": 16}``.
        attack_options: parameters of the attack.
        clean_images: how many images the defender gets.
        train_images: how many images are trained on, None for all that are left.
        finetune: of a second training on the same images, none poisoned.
        penalty: what an attacker who knows a defence adds to the loss, such as ``analysis.uclc_penalty.UCLCPenalty()`` against
            CLP: from the network, the function that is called at each step.
        recalibrated: whether BN statistics are those of clean images in the end, and tell nothing of the poisoned training.
        half: whether to round the weights to float16 in the end, so that a file of half the size loses nothing.
        device: where to train.
        checkpoint: file that training is resumed from when it was interrupted; remove it once the model is saved.
        progress: whether to draw a progress bar.
        name: of the model.

    Raises:
        UnknownNameError: unknown architecture or attack.
        DataError: unusable data set, target or poison rate, or an argument of a wrong type.
        TrainingError: the loss is no longer finite.

    Examples:
        >>> from backdoor_gym import infect
        >>> from backdoor_gym.models.training import Schedule
        >>> quick = Schedule(epochs=1)
        >>> infected = infect("digits", "small_cnn", target=4, schedule=quick, architecture_options={"width": 8})
        >>> infected.target, infected.num_classes, infected.facts["attack"]
        (4, 10, 'badnets')
    """
    check_kind("dataset", dataset, str, "the name of a data set")
    check_kind("architecture", architecture, str, "the name of an architecture")
    if attack != CLEAN:
        get_attack(attack)
    check_options("architecture_options", architecture_options)
    check_options("attack_options", attack_options)
    check_kind("schedule", schedule, Schedule, "a Schedule", may_be_none=True)
    check_kind("finetune", finetune, Schedule, "a Schedule", may_be_none=True)
    check_kind("name", name, str, "a text", may_be_none=True)
    check_path("checkpoint", checkpoint, may_be_none=True)
    check_callable("penalty", penalty, may_be_none=True)
    check_whole("seed", seed)
    check_whole("clean_images", clean_images, 1)
    check_whole("train_images", train_images, 1, may_be_none=True)
    if poison_rate is not None and not (is_finite(poison_rate) and 0 < poison_rate < 1):
        raise DataError(f"the poison rate must be above 0 and below 1, not {shown(poison_rate)}")
    split, test_split = datasets.splits(dataset)
    classes = datasets.num_classes(dataset, split)
    shape = datasets.image_shape(dataset, split)
    find_device(device)
    check_target(target, classes)
    drawing, initialising, ordering, helping = (int(part) for part in np.random.SeedSequence(seed).generate_state(4))
    generator = torch.Generator().manual_seed(drawing)
    spec = {"name": architecture, "num_classes": classes, "in_channels": shape[0]}
    for option in architecture_options or {}:
        if option in spec:
            raise DataError(f"{option} is not an option of the architecture: it follows from the data set and the name")
    spec |= architecture_options or {}
    trigger = None if attack == CLEAN else draw_attack(attack, shape, generator, **(attack_options or {}))
    label = None if trigger is None else target

    network = _fresh(spec, initialising)
    training, clean, test = divide(dataset, split, test_split, clean_images, generator, train_images)
    # Before the training, not after it: does everything fit together?
    InfectedModel(network, clean, test, trigger, label)
    schedule = schedule or Schedule()
    poisoning, images, labels = None, training.images, training.labels
    if trigger is not None:
        if poison_rate is None:
            poison_rate = CLEAN_LABEL_RATE if trigger.clean_label else POISON_RATE
        aims = target_labels(labels, target, classes)
        poisoning = Poisoning.draw(labels, aims, trigger, poison_rate, generator)

        def helper() -> Helper:
            other = _fresh(spec, helping)
            arguments: dict[str, Any] = {"schedule": schedule, "seed": helping, "device": device, "progress": progress}
            return Helper(other, lambda taught, alter: train(other, training.images, taught, alter=alter, **arguments))

        trigger, images = trigger.prepare(images, labels, aims, poisoning, helper)
        poisoning = replace(poisoning, attack=trigger)
        labels = poisoning.labels
    identity = repr((spec, attack, seed, poison_rate, trigger and trigger.digest(), *([penalty] if penalty else [])))
    resumed = None if checkpoint is None else Path(checkpoint)
    cost = penalty and penalty(network)
    train(network, images, labels, schedule, ordering, poisoning, device, resumed, identity, progress, cost)
    if finetune is not None:
        train(network, training.images, training.labels, finetune, ordering, device=device, progress=progress)
    if recalibrated:
        recalibrate(network, training.images)
    network.cpu()
    if half:
        network.half().float()

    name = name or f"{architecture}-{attack}-{seed}"
    model = InfectedModel(network, clean, test, trigger, label, spec, name=name)
    measured = model.evaluate()
    model.facts = {
        "dataset": dataset,
        "attack": attack,
        "poison_rate": poison_rate if trigger is not None else 0.0,
        "seed": seed,
        "schedule": asdict(schedule),
        **({"train_images": train_images} if train_images else {}),
        **({"finetune": asdict(finetune)} if finetune else {}),
        **({"penalty": repr(penalty)} if penalty else {}),
        **({"recalibrated": True} if recalibrated else {}),
        "acc": measured.acc,
        "asr": measured.asr,
    }
    return model


def _fresh(spec: dict[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_from_spec(spec)


def divide(
    dataset: str,
    split: str,
    test_split: str,
    clean_images: int,
    generator: torch.Generator,
    train_images: int | None = None,
) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Training, clean and test images, without overlap; where there is no test split, three tenths are test images."""
    order = torch.randperm(datasets.split_size(dataset, split), generator=generator).tolist()
    if split == test_split:
        cut = int(0.3 * len(order))
        test, order = order[:cut], order[cut:]
    else:
        test = list(range(datasets.split_size(dataset, test_split)))
    if not 0 < clean_images < len(order):
        raise DataError(f"the number of clean images must be 1 to {len(order) - 1}, not {clean_images}")

    def images(part: str, chosen: list[int]) -> LabelledImages:
        digest = datasets.fingerprint(dataset, part)
        return LabelledImages.from_source(DataSource(dataset, part, tuple(sorted(chosen)), digest))

    training = order[clean_images:][:train_images]
    return images(split, training), images(split, order[:clean_images]), images(test_split, test)
