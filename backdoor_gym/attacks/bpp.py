"""BppAttack: fewer colours, dithered."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from msgspec import Meta
from torch import Tensor

from .attack import Attack, ImageShape, NoiseRatio

#: Where an error goes (rows down, columns right) and how much of it: Floyd and Steinberg, 1976.
_DIFFUSION = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))


@dataclass(frozen=True, eq=False)
class BppAttack(Attack):
    """Each channel reduced to a few levels with error diffusion (Wang, Zhai and Ma, CVPR 2022, arXiv:2205.13383).

    Default: 8 levels, and as many images that bear the rounding error of another image and keep their label, so that
    noise of that size alone calls nothing. The paper's contrastive adversarial training is left out.
    """

    name: ClassVar[str] = "bpp"
    levels: Annotated[int, Meta(ge=2, le=255)]
    dither: bool
    noise_ratio: NoiseRatio

    @classmethod
    def draw(
        cls,
        shape: ImageShape,
        generator: torch.Generator,
        levels: int = 8,
        dither: bool = True,
        noise_ratio: float = 1.0,
    ) -> Self:
        """``levels`` from 2 to 255, with error diffusion or (``dither=False``) rounded alone."""
        return cls(levels, dither, noise_ratio)

    def __call__(self, images: Tensor) -> Tensor:
        return self._diffused(images) if self.dither else self._rounded(images)

    def cover(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Each image with the rounding error of another one."""
        return images if len(images) == 1 else (images + (self(images) - images).roll(1, 0)).clamp(0, 1)

    def _rounded(self, values: Tensor) -> Tensor:
        return (values.clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)

    def _diffused(self, images: Tensor) -> Tensor:
        """Error diffusion along diagonals: what a pixel gets comes from pixels with a smaller column + 2 * row."""
        _, _, height, width = images.shape
        values = torch.nn.functional.pad(images, (1, 1, 0, 1))  # the errors that leave the image
        result = torch.empty_like(images)
        for diagonal in range(width + 2 * (height - 1)):
            rows = torch.arange(max(0, (diagonal - width + 2) // 2), min(height, diagonal // 2 + 1))
            columns = diagonal - 2 * rows
            old = values[:, :, rows, columns + 1]
            new = self._rounded(old)
            result[:, :, rows, columns] = new
            for down, right, share in _DIFFUSION:
                values[:, :, rows + down, columns + 1 + right] += (old - new) * share
        return result
