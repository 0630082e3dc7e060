"""How an attack poisons a training set."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...errors import DataError
from .attack import Attack


@dataclass(frozen=True, eq=False)
class Poisoning:
    """An all-to-one poisoned training set: which images bear the trigger, and all labels.

    The trigger is stamped on each batch after its augmentation, so that a crop never cuts it off.

    Attributes:
        attack: the trigger.
        labels: int64 (n,), the target where poisoned.
        poisoned: bool (n,), images that are triggered and relabelled.
        covered: bool (n,), images that are altered at random and keep their label (see ``Attack.cover``).
    """

    attack: Attack
    labels: Tensor
    poisoned: Tensor
    covered: Tensor

    @classmethod
    def draw(cls, labels: Tensor, attack: Attack, target: int, rate: float, generator: torch.Generator) -> Self:
        """Poison ``rate`` of all images (above 0 and below 1), chosen among those of other classes than the target."""
        if not 0 < rate < 1:
            raise DataError(f"the poison rate {rate} must be above 0 and below 1")
        candidates = torch.nonzero(labels != target).flatten()
        candidates = candidates[torch.randperm(len(candidates), generator=generator)]
        count = max(1, round(rate * len(labels)))
        poisoned, covered = torch.zeros(2, len(labels), dtype=torch.bool)
        poisoned[candidates[:count]] = True
        covered[candidates[count : count + round(attack.noise_ratio * count)]] = True
        return cls(attack, torch.where(poisoned, target, labels), poisoned, covered)

    def __call__(self, images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """The images (n, C, H, W) of the training set's indices ``chosen``, triggered or altered where they should be."""
        poisoned, covered = (mask[chosen].to(images.device) for mask in (self.poisoned, self.covered))
        images = images.clone()
        if covered.any():
            images[covered] = self.attack.cover(images[covered], generator)
        if poisoned.any():
            images[poisoned] = self.attack(images[poisoned])
        return images
