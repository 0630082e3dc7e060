"""What architectures of the ImageNet kind share: widths other than the published one, and images smaller than 224x224."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from ..errors import DataError


def scaled(channels: int, width: int, published: int) -> int:
    """Channels of a layer in a network of ``width`` channels at its beginning instead of the ``published`` ones."""
    return max(1, round(channels * width / published))


def strides(halvings: int, most: int) -> list[int]:
    """Strides of the places that halve the image, of which the first ones do not where there are fewer halvings.

    Raises:
        DataError: more than there are places, or fewer than none.
    """
    if not 0 <= halvings <= most:
        raise DataError(f"the number of halvings must be 0 to {most}, not {halvings}")
    return [1] * (most - halvings) + [2] * halvings


def divisible(channels: float) -> int:
    """The nearest multiple of 8, and not less than nine tenths (Sandler et al., 2018, as published code rounds)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class ConvNormActivation(nn.Sequential):
    """A convolution ("0") that keeps the image's size, BN ("1") and an activation ("2"), if any."""

    def __init__(
        self,
        in_planes: int,
        planes: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[[], nn.Module] | None = nn.ReLU,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        padding = (kernel - 1) // 2
        layers: list[nn.Module] = [
            nn.Conv2d(in_planes, planes, kernel, stride, padding, groups=groups, bias=False),
            norm(planes),
        ]
        if activation is not None:
            layers.append(activation())
        super().__init__(OrderedDict((str(index), layer) for index, layer in enumerate(layers)))
