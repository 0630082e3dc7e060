"""Backdoor attacks by name: how each stamps its trigger on images, and how it poisons a training set."""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError, ModelFileError, UnknownNameError
from .attack import Attack, ImageShape
from .badnets import BadNets
from .blended import Blended
from .poisoning import Poisoning
from .sig import SIG
from .wanet import WaNet

__all__ = [
    "ATTACKS",
    "SIG",
    "Attack",
    "BadNets",
    "Blended",
    "ImageShape",
    "Poisoning",
    "WaNet",
    "attack_from_state",
    "draw_attack",
    "get_attack",
]

ATTACKS: dict[str, type[Attack]] = {attack.name: attack for attack in (BadNets, Blended, SIG, WaNet)}


def get_attack(name: str) -> type[Attack]:
    """The attack class of that name.

    Raises:
        UnknownNameError: no such attack.
    """
    if name not in ATTACKS:
        raise UnknownNameError("attack", name, ATTACKS)
    return ATTACKS[name]


def draw_attack(name: str, shape: ImageShape, generator: torch.Generator, **parameters: Any) -> Attack:
    """An attack by name, for images of this shape.

    Raises:
        UnknownNameError: no such attack, or a parameter it does not have.
        DataError: a parameter of an unusable value.
    """
    attack = get_attack(name)
    known = set(inspect.signature(attack.draw).parameters) - {"shape", "generator"}
    for parameter in parameters:
        if parameter not in known:
            raise UnknownNameError(f"option of {name}", parameter, known)
    try:
        return attack.draw(shape, generator, **parameters)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the options {parameters} of {name} cannot be used: {error}") from error


def attack_from_state(name: str, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> Attack:
    """The attack that ``Attack.state`` described.

    Raises:
        ModelFileError: parameters or tensors do not fit the attack.
    """
    attack = get_attack(name)
    given, needed = {*parameters, *tensors}, {field.name for field in fields(attack)}  # type: ignore[arg-type]
    if given != needed:
        raise ModelFileError(f"the trigger of {name} needs {sorted(needed)}, the file has {sorted(given)}")
    return attack(**parameters, **tensors)
