"""How an attack poisons a training set."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..errors import DataError
from .attack import Attack


@dataclass(frozen=True, eq=False)
class Poisoning:
    """A poisoned training set; the trigger is stamped on each batch after its augmentation, so that a crop never cuts it off.

    Attributes:
        attack: the trigger.
        labels: int64 (n,), the attacker's where poisoned.
        poisoned: bool (n,), images that are triggered and, but for a clean-label attack, relabelled.
        covered: bool (n,), images that are altered at random and keep their label (see ``Attack.cover``).
    """

    attack: Attack
    labels: Tensor
    poisoned: Tensor
    covered: Tensor

    @classmethod
    def draw(cls, labels: Tensor, aims: Tensor, attack: Attack, rate: float, generator: torch.Generator) -> Self:
        """Choose the images.

        Args:
            labels: the true labels, int64 (n,).
            aims: those that the attacker wants of triggered images, int64 (n,) (see ``target_labels``).
            attack: the trigger. A clean-label one poisons images that have that label, others those that have not.
            rate: share of all images that are poisoned, of a clean-label attack of those that can be; above 0 and below 1.
            generator: of the choice.

        Raises:
            DataError: a rate out of range, or a clean-label attack that would have no image.
        """
        if not 0 < rate < 1:
            raise DataError(f"the poison rate {rate} must be above 0 and below 1")
        candidates = torch.nonzero((labels == aims) if attack.clean_label else (labels != aims)).flatten()
        if attack.clean_label and not len(candidates):
            raise DataError(f"{attack.name} poisons images of the target class alone, and there are none")
        candidates = candidates[torch.randperm(len(candidates), generator=generator)]
        count = max(1, round(rate * len(candidates if attack.clean_label else labels)))
        poisoned, covered = torch.zeros(2, len(labels), dtype=torch.bool)
        poisoned[candidates[:count]] = True
        covered[candidates[count : count + round(attack.noise_ratio * count)]] = True
        return cls(attack, torch.where(poisoned, aims, labels), poisoned, covered)

    def __call__(self, images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """The images (n, C, H, W) of the training set's indices ``chosen``, triggered or altered where they should be."""
        poisoned, covered = (mask[chosen].to(images.device) for mask in (self.poisoned, self.covered))
        images = images.clone()
        if covered.any():
            images[covered] = self.attack.cover(images[covered], generator)
        if poisoned.any():
            images[poisoned] = self.attack(images[poisoned])
        return images
