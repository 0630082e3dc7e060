"""Draws what each attack does to CIFAR-10 images: clean, triggered, and the difference.

    BACKDOOR_GYM_DATA=... python docs/attack_pictures.py

The result is ``docs/pictures/attacks.png``. Label-consistent and input-aware learn with a helper first, here a small network
trained for a short time on 1,500 images, in half a minute of one core.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from backdoor_gym.attacks import ATTACKS, Alter, Attack, Helper, LabelConsistent, Poisoning, draw_attack
from backdoor_gym.attacks.targets import target_labels
from backdoor_gym.data.datasets import load_images
from backdoor_gym.models.training import Schedule, train
from backdoor_gym.networks import build

PICTURE = Path(__file__).parent / "pictures" / "attacks.png"
DATA, TARGET, LEARNED_FROM = "uoft-cs/cifar10", 0, 1500
SCHEDULE = Schedule(epochs=6, learning_rate=0.05)
AMPLIFIED = 3
#: Test images, which bear different triggers of multi-trigger, and two poisoned images of the target class, planes.
SHOWN, OF_TARGET = (1, 2), (3, 10)


def helper_for(images: Tensor) -> Helper:
    """A small network for attacks that learn with one."""
    torch.manual_seed(0)
    network = build("small_cnn", num_classes=10, in_channels=3, width=16, blocks=3)

    def run(labels: Tensor, alter: Alter | None) -> None:
        train(network, images, labels, SCHEDULE, 0, alter, progress=True)

    return Helper(network, run)


def learned(attack: Attack, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Attack, Tensor, Poisoning]:
    """The attack after what it learns, its training images, and which of them are poisoned."""
    poisoning = Poisoning.draw(labels, targets, attack, 0.5, torch.Generator().manual_seed(0))
    prepared, altered = attack.prepare(images, labels, targets, poisoning, lambda: helper_for(images))
    return prepared, altered, poisoning


def rows() -> list[tuple[str, Tensor, Tensor]]:
    """A caption, two images, and the same two with the trigger."""
    test, _ = load_images(DATA, "test", SHOWN)
    images, labels = load_images(DATA, "train", range(LEARNED_FROM))
    targets = target_labels(labels, TARGET, 10)
    drawn = []
    for name in ATTACKS:
        attack = draw_attack(name, (3, 32, 32), torch.Generator().manual_seed(0))
        attack, altered, poisoning = learned(attack, images, labels, targets)
        drawn.append((name, test, attack(test)))
        if isinstance(attack, LabelConsistent):
            two = poisoning.poisoned.nonzero().flatten()[list(OF_TARGET)]
            drawn.append((f"{name},\nas in training", images[two], attack(altered[two])))
    return drawn


def draw(drawn: list[tuple[str, Tensor, Tensor]]) -> None:
    """The picture of what ``rows`` gives."""
    kinds: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
        ("clean", lambda clean, triggered: clean),
        ("triggered", lambda clean, triggered: triggered),
        (f"difference x {AMPLIFIED}", lambda clean, triggered: (0.5 + AMPLIFIED * (triggered - clean)).clamp(0, 1)),
    )
    figure, axes = plt.subplots(len(drawn), 6, figsize=(10.2, 1.68 * len(drawn)), layout="constrained")
    for column, axis in enumerate(axes[0]):
        axis.set_title(kinds[column % 3][0], fontsize=11)
    for row, (caption, clean, triggered) in zip(axes, drawn, strict=True):
        for column, axis in enumerate(row):
            image, show = column // 3, kinds[column % 3][1]
            axis.imshow(show(clean[image], triggered[image]).permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)


def main() -> None:
    """Draw it."""
    torch.set_num_threads(1)
    draw(rows())


if __name__ == "__main__":
    main()
