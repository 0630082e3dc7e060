"""What an unknown trigger may do to an image: two families with parameters that a search can follow."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


class TriggerFamily(ABC):
    """A change of images that begins as none.

    Args:
        images: some that it is for, float32 (n, C, H, W).

    Attributes:
        name: of the family.
        rate: step of the search in units of ``parameter``.
        parameter: what is sought, float32, requires a gradient.
    """

    name: str
    rate: float
    parameter: Tensor

    @abstractmethod
    def __init__(self, images: Tensor) -> None: ...

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Images, float32 (n, C, H, W) in [0, 1], as they would be with the trigger."""

    @abstractmethod
    def price(self) -> Tensor:
        """What the parameter costs in the search: of triggers that do the same the smaller is to be found."""


class Addition(TriggerFamily):
    """A pattern that is added, as patches, blended images and sinusoids are."""

    name = "addition"
    rate = 0.1

    def __init__(self, images: Tensor) -> None:
        self.parameter = torch.zeros_like(images[:1]).requires_grad_()

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self.parameter).clamp(0, 1)

    def price(self) -> Tensor:
        return self.parameter.abs().mean()


class Warp(TriggerFamily):
    """A smooth warp: offsets of 4 x 4 points in pixels, bicubically interpolated (WaNet, arXiv:2102.10369, section 3)."""

    name = "warp"
    rate = 0.2
    points = 4
    #: For each pixel of mean offset: a pixel moves little, and is worth a tenth of an image's whole range.
    weight = 0.1

    def __init__(self, images: Tensor) -> None:
        self.parameter = images.new_zeros(1, 2, self.points, self.points).requires_grad_()
        self.size = images.shape[2:]
        rows, columns = (torch.linspace(-1, 1, count, device=images.device) for count in self.size)
        self.still = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=2)

    def __call__(self, images: Tensor) -> Tensor:
        height, width = self.size
        flow = F.interpolate(self.parameter, size=self.size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        pixels = 2 / (flow.new_tensor([width, height]) - 1).clamp(min=1)
        grid = (self.still + flow * pixels).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=True).clamp(0, 1)

    def price(self) -> Tensor:
        return self.weight * self.parameter.abs().mean()


#: All that are tried.
FAMILIES: tuple[type[TriggerFamily], ...] = (Addition, Warp)
