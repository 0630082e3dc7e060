"""WaNet: a warp."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .attack import Attack, ImageShape, NoiseRatio


@dataclass(frozen=True, eq=False)
class WaNet(Attack):
    """A smooth warp (Nguyen and Tran, 2021, arXiv:2102.10369, section 3); default: k = 4, s = 0.5, twice as many noise images."""

    name: ClassVar[str] = "wanet"
    flow: Tensor  # (H, W, 2) offsets in units of half the image
    noise_ratio: NoiseRatio

    @classmethod
    def draw(
        cls, shape: ImageShape, generator: torch.Generator, k: int = 4, strength: float = 0.5, noise_ratio: float = 2.0
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
