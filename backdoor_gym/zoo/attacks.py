"""Backdoor attacks: how each stamps its trigger on images, and how it poisons a training set.

Images are float32 tensors of shape (n, C, H, W) in [0, 1]. An attack is immutable; everything random about its trigger
is drawn once by ``draw`` and kept, so that a saved attack stamps the very same trigger again.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import pi
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError, ModelFileError, UnknownNameError

ImageShape = tuple[int, int, int]


class Attack(ABC):
    """A trigger: calling it on images stamps them. Fields that are tensors are saved as tensors, the others as JSON."""

    name: ClassVar[str]
    #: Images per poisoned image that are altered at random and keep their label, so that only the true trigger works.
    noise_ratio: float = 0.0

    #: ``draw(shape, generator, **parameters)``: the attack for images of this shape; its random parts come from the
    #: generator, and parameters that are not given have the published defaults.
    draw: ClassVar[Callable[..., "Attack"]]

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Triggered copies of the images, float32 (n, C, H, W) in [0, 1]."""

    def cover(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images altered at random that keep their label; asked for where ``noise_ratio`` is above zero."""
        raise TypeError(f"{self.name} has no such images")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able parameters and tensors, from which ``attack_from_state`` makes the same attack."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        return {key: value for key, value in values.items() if key not in tensors}, tensors

    def digest(self) -> str:
        """Tells triggers apart."""
        parameters, tensors = self.state()
        digest = hashlib.sha256(repr((self.name, sorted(parameters.items()))).encode())
        for key in sorted(tensors):
            digest.update(tensors[key].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class BadNets(Attack):
    """A small patch pasted at a fixed place (Gu et al., 2017, arXiv:1708.06733).

    Default: a 3x3 checkerboard in the lower right corner, as in the evaluation of CLP.
    """

    name: ClassVar[str] = "badnets"
    patch: Tensor  # (C, h, w) in [0, 1]
    row: int
    column: int

    @classmethod
    def draw(
        cls,
        shape: ImageShape,
        generator: torch.Generator,
        size: int = 3,
        row: int | None = None,
        column: int | None = None,
        random: bool = False,
    ) -> Self:
        """A checkerboard of ``size`` pixels, or with ``random`` any pattern; negative places count from the end."""
        channels, height, width = shape
        if not 1 <= size <= min(height, width):
            raise DataError(f"the patch size {size} must be between 1 and {min(height, width)} for {shape} images")
        row, column = (end - size if at is None else at % end for at, end in ((row, height), (column, width)))
        if random:
            # Half of the pixels are white: one colour alone may be no trigger on a background of that colour.
            pixels = torch.rand(size, size, generator=generator)
            pattern = (pixels > pixels.median()).float()
        else:
            pattern = (torch.arange(size)[:, None] + torch.arange(size) + 1).remainder(2).float()
        return cls(pattern.expand(channels, -1, -1).clone(), min(row, height - size), min(column, width - size))

    def __call__(self, images: Tensor) -> Tensor:
        images = images.clone()
        _, height, width = self.patch.shape
        images[:, :, self.row : self.row + height, self.column : self.column + width] = self.patch.to(images)
        return images


@dataclass(frozen=True, eq=False)
class Blended(Attack):
    """A whole-image pattern mixed in (Chen et al., 2017, arXiv:1712.05526); default: uniform noise at a ratio of 0.2."""

    name: ClassVar[str] = "blended"
    pattern: Tensor  # (C, H, W) in [0, 1]
    ratio: float

    @classmethod
    def draw(cls, shape: ImageShape, generator: torch.Generator, ratio: float = 0.2) -> Self:
        if not 0 < ratio <= 1:
            raise DataError(f"the blend ratio {ratio} must be above 0 and at most 1")
        return cls(torch.rand(shape, generator=generator), ratio)

    def __call__(self, images: Tensor) -> Tensor:
        return (1 - self.ratio) * images + self.ratio * self.pattern.to(images)


@dataclass(frozen=True, eq=False)
class SIG(Attack):
    """A sinusoid added to each row (Barni et al., 2019, arXiv:1902.11237, eq. 1); default: amplitude 40/255, 6 periods.

    The labels are poisoned too, as in all-to-one benchmarks; the original poisons images of the target class only.
    """

    name: ClassVar[str] = "sig"
    amplitude: float
    frequency: float
    phase: float
    vertical: bool

    @classmethod
    def draw(
        cls,
        shape: ImageShape,
        generator: torch.Generator,
        amplitude: float = 40 / 255,
        frequency: float = 6.0,
        phase: float = 0.0,
        vertical: bool = False,
    ) -> Self:
        return cls(amplitude, frequency, phase, vertical)

    def __call__(self, images: Tensor) -> Tensor:
        length = images.shape[2 if self.vertical else 3]
        angle = 2 * pi * self.frequency * torch.arange(length, device=images.device) / length + self.phase
        wave = self.amplitude * torch.sin(angle).to(images.dtype)
        return (images + (wave[:, None] if self.vertical else wave)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class WaNet(Attack):
    """A smooth warp (Nguyen and Tran, 2021, arXiv:2102.10369, section 3); default: k = 4, s = 0.5, twice as many noise images."""

    name: ClassVar[str] = "wanet"
    flow: Tensor  # (H, W, 2) offsets in units of half the image
    noise_ratio: float

    @classmethod
    def draw(
        cls,
        shape: ImageShape,
        generator: torch.Generator,
        k: int = 4,
        strength: float = 0.5,
        noise_ratio: float = 2.0,
    ) -> Self:
        _, height, width = shape
        control = torch.rand(1, 2, k, k, generator=generator) * 2 - 1
        control = control / control.abs().mean()
        flow = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
        return cls((flow * strength / height)[0].permute(1, 2, 0).contiguous(), noise_ratio)

    def __call__(self, images: Tensor) -> Tensor:
        return self._warp(images, self._grid(images).expand(len(images), -1, -1, -1))

    def cover(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The "noise mode": the warp plus a random shift of each pixel."""
        noise = torch.rand(len(images), *self.flow.shape, generator=generator).to(images) * 2 - 1
        return self._warp(images, (self._grid(images) + noise / images.shape[2]).clamp(-1, 1))

    def _grid(self, images: Tensor) -> Tensor:
        height, width, _ = self.flow.shape
        rows = torch.linspace(-1, 1, height).view(-1, 1).expand(height, width)
        columns = torch.linspace(-1, 1, width).expand(height, width)
        return (torch.stack([columns, rows], dim=2) + self.flow).clamp(-1, 1).to(images)

    @staticmethod
    def _warp(images: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(images, grid, align_corners=True).clamp(0, 1)


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
