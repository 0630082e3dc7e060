"""What architectures share: other widths than the published ones, images smaller than 224x224, stages of blocks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DataError


def scaled(channels: int, width: int, published: int) -> int:
    """Channels of a layer in a network of ``width`` channels at its beginning instead of the ``published`` ones."""
    return max(1, round(channels * width / published))


def strides(halvings: int, most: int) -> list[int]:
    """Strides of the places that halve the image; the first ones do not where there are fewer halvings.

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


class FeatureNetwork(nn.Module):
    """``features``, pooled over positions, then ``classifier``."""

    features: nn.Module
    classifier: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Staged(nn.Module):
    """A network with stages of blocks, called ``layer1``, ``layer2``, ..."""

    def add_stages(
        self, block: Any, counts: Sequence[int], in_planes: int, width: int, strides: Sequence[int], **options: Any
    ) -> int:
        """Add stages of ``width``, 2, 4, ... times ``width`` channels; gives the channels of the last one.

        Args:
            block: a class of modules, called with input channels, channels, stride and ``options``; its ``expansion`` is the
                output channels over ``channels``.
            counts: blocks of each stage.
            in_planes: channels before the first stage.
            width: channels of the first stage.
            strides: of the first block of each stage.
            **options: of the blocks.
        """
        self.stages = [f"layer{stage + 1}" for stage in range(len(counts))]
        for stage, (name, count, stride) in enumerate(zip(self.stages, counts, strides, strict=True)):
            layers = []
            for index in range(count):
                layers.append(block(in_planes, width * 2**stage, stride if index == 0 else 1, **options))
                in_planes = width * 2**stage * block.expansion
            self.add_module(name, nn.Sequential(*layers))
        return in_planes

    def through_stages(self, x: Tensor) -> Tensor:
        """All stages, one after the other."""
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x


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
        layers = OrderedDict[str, nn.Module]()
        layers["0"] = nn.Conv2d(in_planes, planes, kernel, stride, padding, groups=groups, bias=False)
        layers["1"] = norm(planes)
        if activation is not None:
            layers["2"] = activation()
        super().__init__(layers)
