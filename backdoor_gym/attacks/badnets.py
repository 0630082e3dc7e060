"""BadNets: a patch."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import DataError
from .attack import Attack, ImageShape, Place


@dataclass(frozen=True, eq=False)
class BadNets(Attack):
    """A small patch pasted at a fixed place (Gu et al., 2017, arXiv:1708.06733).

    Default: a 3x3 checkerboard in the lower right corner, as in the evaluation of CLP.
    """

    name: ClassVar[str] = "badnets"
    span: ClassVar[tuple[float, float]] = (0, 1)
    patch: Tensor  # (C, h, w)
    row: Place
    column: Place

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
