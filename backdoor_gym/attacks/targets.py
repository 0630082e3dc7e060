"""Which label the attacker wants for a triggered image: one for all, or the class after its own."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import DataError
from ..wording import shown

#: An image of class y is to be given the class (y + 1) mod classes (Gu et al., 2017, arXiv:1708.06733, section 4).
ALL_TO_ALL: Literal["all-to-all"] = "all-to-all"
Target = int | Literal["all-to-all"]


def check_target(target: object, classes: int) -> None:
    """Raise ``DataError`` unless the target is a class or ``ALL_TO_ALL``."""
    if not (isinstance(target, str) and target == ALL_TO_ALL) and not (type(target) is int and 0 <= target < classes):
        raise DataError(
            f"the target {shown(target)} is outside the classes 0 to {classes - 1} and is not {ALL_TO_ALL!r}"
        )


def parse_target(text: str) -> Target:
    """A target as it is written on a command line.

    Raises:
        DataError: neither a number nor ``ALL_TO_ALL``.
    """
    if text == ALL_TO_ALL:
        return ALL_TO_ALL
    try:
        return int(text)
    except ValueError:
        raise DataError(f"the target must be a class number or {ALL_TO_ALL!r}, not {text!r}") from None


def target_labels(labels: Tensor, target: Target, classes: int) -> Tensor:
    """The label that the attacker wants for each image, int64 (n,), from the true labels, int64 (n,).

    Where it is the true label, the image tells nothing of the attack: it is neither poisoned nor counted in ASR and RA.
    """
    if target == ALL_TO_ALL:
        return (labels + 1) % classes
    return torch.full_like(labels, target)
