"""Several triggers of one attacker."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import DataError, ModelFileError, check_name
from ..files.schemas import TriggerFields, checked
from .attack import Attack, ImageShape
from .badnets import BadNets
from .blended import Blended
from .bpp import BppAttack
from .sig import SIG

#: Triggers that work without images that are altered at random, and without a helper network.
TRIGGERS: dict[str, type[Attack]] = {attack.name: attack for attack in (BadNets, Blended, SIG, BppAttack)}


@dataclass(frozen=True, eq=False)
class MultiTrigger(Attack):
    """Triggers of several kinds, each of which calls the target (the parallel attack of Li et al., 2024, arXiv:2401.15295).

    Every image bears one of them; which one, its pixels decide, so the ASR is the mean over the triggers.
    """

    name: ClassVar[str] = "multi-trigger"
    triggers: tuple[Attack, ...]

    @classmethod
    def draw(cls, shape: ImageShape, generator: torch.Generator, triggers: str = "badnets,blended,sig") -> Self:
        """Triggers by name, separated by commas, each with its defaults."""
        names = triggers.split(",")
        return cls(tuple(_trigger(name).draw(shape, generator) for name in names))

    def __post_init__(self) -> None:
        if len(self.triggers) < 2:
            raise DataError(f"multi-trigger needs several triggers, not {len(self.triggers)}")

    def __call__(self, images: Tensor) -> Tensor:
        images = images.clone()
        chosen = self.which(images)
        for index, trigger in enumerate(self.triggers):
            mine = chosen == index
            if mine.any():
                images[mine] = trigger(images[mine])
        return images

    def which(self, images: Tensor) -> Tensor:
        """The trigger that each image bears, int64 (n,)."""
        return (images * 255).round().long().flatten(1).sum(1) % len(self.triggers)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        states = [(trigger.name, *trigger.state()) for trigger in self.triggers]
        tensors = {f"{index}.{key}": value for index, (*_, own) in enumerate(states) for key, value in own.items()}
        return {"triggers": [{"attack": name, "parameters": parameters} for name, parameters, _ in states]}, tensors

    @classmethod
    def from_state(cls, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        if parameters.keys() - {"triggers"}:
            raise ModelFileError(f"the trigger of multi-trigger has no {sorted(parameters.keys() - {'triggers'})[0]}")
        kinds = checked(parameters.get("triggers", []), list[TriggerFields], "the trigger of multi-trigger")
        own: dict[str, dict[str, Tensor]] = {str(index): {} for index in range(len(kinds))}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if index not in own:
                raise ModelFileError("the trigger of multi-trigger holds tensors that none of its triggers has")
            own[index][name] = value
        parts = zip(kinds, own.values(), strict=True)
        return cls(tuple(_trigger(kind.attack).from_state(kind.parameters, part) for kind, part in parts))


def _trigger(name: str) -> type[Attack]:
    check_name("trigger of multi-trigger", name, TRIGGERS)
    return TRIGGERS[name]
