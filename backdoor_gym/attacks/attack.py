"""What an attack is: a trigger that is stamped on images, and that can be saved.

Images are float32 tensors (n, C, H, W) in [0, 1]. ``draw`` draws everything random about a trigger once, so that a saved attack
stamps the very same trigger again.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_type_hints

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from ..errors import DataError, ModelFileError
from ..files.schemas import checked
from ..wording import shown

if TYPE_CHECKING:
    from .poisoning import Poisoning

ImageShape = tuple[int, int, int]
#: Changes a batch in training, from its images, their indices and a generator.
Alter = Callable[[Tensor, Tensor, torch.Generator], Tensor]
#: Fields of attacks: a share, a place in an image, and images for each poisoned one.
Share = Annotated[float, Meta(gt=0, le=1)]
Place = Annotated[int, Meta(ge=0)]
NoiseRatio = Annotated[float, Meta(ge=0, le=1000)]
#: What a trigger must change of a pixel at least: less is what floats round.
LEAST_CHANGE = 1e-4


@dataclass(frozen=True)
class Helper:
    """A network that the attacker trains to prepare the attack, and that nobody sees.

    Attributes:
        network: freshly initialised, of the architecture of the infected one.
        train: trains it on the training images with these labels, int64 (n,), each batch altered if there is an ``Alter``.
    """

    network: nn.Module
    train: Callable[[Tensor, Alter | None], None]


class Attack(ABC):
    """A trigger: a frozen dataclass whose fields are tensors (saved as such) or JSON-able, annotated with their ranges.

    Raises:
        DataError: a field of another type or out of its range.
    """

    name: ClassVar[str]
    #: Whether only images of the target class are poisoned, which keep their label.
    clean_label: ClassVar[bool] = False
    #: Images per poisoned image that are altered at random and keep their label, so that only the true trigger works.
    noise_ratio: float = 0.0
    #: Lowest and highest number in its tensors.
    span: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    #: ``draw(shape, generator, **parameters)``: the attack for images of this shape, with the published defaults.
    draw: ClassVar[Callable[..., "Attack"]]

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self), include_extras=True)
        for key, value in ((field.name, getattr(self, field.name)) for field in fields(self)):  # type: ignore[arg-type]
            what = f"the {key} of the trigger of {self.name}"
            if kinds[key] is Tensor:
                check_tensor(what, value, *self.span)
                continue
            number = value.item() if isinstance(value, np.generic) else value
            try:
                msgspec.convert(number, kinds[key])
            except msgspec.ValidationError as error:
                raise DataError(f"{what} cannot be {shown(value)}: {error}") from error
            if isinstance(number, float) and not math.isfinite(number):
                raise DataError(f"{what} must be finite")

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Triggered copies of the images, float32 (n, C, H, W) in [0, 1]."""

    def cover(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images altered at random that keep their label; asked for where ``noise_ratio`` is above zero."""
        raise TypeError(f"{self.name} has no such images")

    def prepare(
        self, images: Tensor, labels: Tensor, aims: Tensor, poisoning: "Poisoning", helper: Callable[[], Helper]
    ) -> tuple["Attack", Tensor]:
        """The attack and the training images as they are used: what an attacker learns before the network is trained.

        Args:
            images: the training images, float32 (n, C, H, W) in [0, 1].
            labels: their true labels, int64 (n,).
            aims: the labels that the attacker wants of triggered images, int64 (n,).
            poisoning: which images will bear the trigger, and the labels of the poisoned set.
            helper: makes a network of the attacker's own.
        """
        return self, images

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able parameters and tensors, from which ``from_state`` makes the same attack."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        return {key: value for key, value in values.items() if key not in tensors}, tensors

    @classmethod
    def from_state(cls, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The attack that ``state`` described.

        Raises:
            ModelFileError: parameters or tensors do not fit the attack.
        """
        given, needed = {*parameters, *tensors}, {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if given != needed:
            raise ModelFileError(f"the trigger of {cls.name} needs {sorted(needed)}, the file has {sorted(given)}")
        kinds = get_type_hints(cls, include_extras=True)
        values = {
            key: checked(value, kinds[key], f"the {key} of the trigger of {cls.name}")
            for key, value in parameters.items()
        }
        try:
            return cls(**values, **tensors)
        except DataError as error:
            raise ModelFileError(str(error)) from error

    def digest(self) -> str:
        """Tells triggers apart."""
        parameters, tensors = self.state()
        digest = hashlib.sha256(repr((self.name, sorted(parameters.items()))).encode())
        for key in sorted(tensors):
            digest.update(tensors[key].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def check_tensor(what: str, tensor: Any, low: float, high: float) -> None:
    """Raise ``DataError`` unless it is float32 and finite, with an element, from ``low`` to ``high``."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
        raise DataError(f"{what} must be a tensor, float32 and finite")
    if not tensor.numel():
        raise DataError(f"{what} is empty: its shape is {tuple(tensor.shape)}")
    if tensor.min() < low or tensor.max() > high:
        raise DataError(f"{what} must lie in [{low:g}, {high:g}]")


def check_change(attack: Attack, shape: ImageShape) -> None:
    """Raise ``DataError`` where a trigger changes nothing of images of this shape (C, H, W), noise in this case."""
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    if not bool(((attack(images) - images).abs() > LEAST_CHANGE).any()):
        raise DataError(f"the trigger of {attack.name} changes nothing of images of shape {shape}")
