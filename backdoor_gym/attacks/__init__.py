"""Backdoor attacks by name: how each stamps its trigger on images, and how it poisons a training set."""

import inspect
from typing import Any

import torch

from ..arguments import check_option_kinds
from ..errors import BackdoorGymError, DataError, check_name
from ..wording import shown
from .attack import Alter, Attack, Helper, ImageShape, check_change
from .badnets import BadNets
from .blended import Blended
from .bpp import BppAttack
from .input_aware import InputAware
from .label_consistent import LabelConsistent
from .multi_trigger import MultiTrigger
from .poisoning import Poisoning
from .sig import SIG
from .wanet import WaNet

__all__ = [
    "ATTACKS", "SIG", "Alter", "Attack", "BadNets", "Blended", "BppAttack", "Helper", "ImageShape", "InputAware",
    "LabelConsistent", "MultiTrigger", "Poisoning", "WaNet", "draw_attack", "get_attack",
]  # fmt: skip

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (BadNets, Blended, SIG, WaNet, LabelConsistent, InputAware, BppAttack, MultiTrigger)
}


def get_attack(name: str) -> type[Attack]:
    """The attack class of that name.

    Raises:
        UnknownNameError: no such attack.
    """
    check_name("attack", name, ATTACKS)
    return ATTACKS[name]


def draw_attack(name: str, shape: ImageShape, generator: torch.Generator, **parameters: Any) -> Attack:
    """An attack by name, for images of this shape (C, H, W).

    Raises:
        UnknownNameError: no such attack, or a parameter it does not have.
        DataError: a parameter of an unusable value.
    """
    attack = get_attack(name)
    for parameter in parameters:
        check_name(
            f"option of {name}", parameter, inspect.signature(attack.draw).parameters.keys() - {"shape", "generator"}
        )
    check_option_kinds(name, attack.draw, parameters)
    try:
        drawn = attack.draw(shape, generator, **parameters)
        check_change(drawn, shape)
        return drawn
    except BackdoorGymError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"the options {shown(parameters)} of {name} cannot be used: {error}") from error
