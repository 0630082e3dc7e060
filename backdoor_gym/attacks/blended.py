"""Blended: a pattern over the whole image."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .attack import Attack, ImageShape, Share


@dataclass(frozen=True, eq=False)
class Blended(Attack):
    """A whole-image pattern mixed in (Chen et al., 2017, arXiv:1712.05526); default: uniform noise at a ratio of 0.2."""

    name: ClassVar[str] = "blended"
    span: ClassVar[tuple[float, float]] = (0, 1)
    pattern: Tensor  # (C, H, W)
    ratio: Share

    @classmethod
    def draw(cls, shape: ImageShape, generator: torch.Generator, ratio: float = 0.2) -> Self:
        return cls(torch.rand(shape, generator=generator), ratio)

    def __call__(self, images: Tensor) -> Tensor:
        return (1 - self.ratio) * images + self.ratio * self.pattern.to(images)
