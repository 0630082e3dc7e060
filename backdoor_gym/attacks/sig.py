"""SIG: a sinusoid over the whole image."""

from dataclasses import dataclass
from math import pi
from typing import Annotated, ClassVar, Self

import torch
from msgspec import Meta
from torch import Tensor

from .attack import Attack, ImageShape, Share

#: Periods, or radians.
Turns = Annotated[float, Meta(ge=-1e4, le=1e4)]


@dataclass(frozen=True, eq=False)
class SIG(Attack):
    """A sinusoid added to each row (Barni et al., 2019, arXiv:1902.11237, eq. 1); default: amplitude 40/255, 6 periods.

    The labels are poisoned too, as in all-to-one benchmarks; the original poisons images of the target class only.
    """

    name: ClassVar[str] = "sig"
    amplitude: Share
    frequency: Turns
    phase: Turns
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
