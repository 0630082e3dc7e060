"""Blended: a pattern over the whole image."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import DataError
from .attack import Attack, ImageShape


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
