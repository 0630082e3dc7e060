"""EfficientNet (Tan and Le, 2019): inverted residual blocks with squeeze-and-excitation and SiLU; the usual checkpoint names."""

import math
from functools import partial

from torch import Tensor, nn

from .scaling import ConvNormActivation, divisible, scaled, strides
from .squeeze_excite import SqueezeExcitation

# Expansion, kernel, channels, blocks, halving of B0 (table 1).
_STAGES = (
    (1, 3, 16, 1, False), (6, 3, 24, 2, True), (6, 5, 40, 2, True), (6, 3, 80, 3, True), (6, 5, 112, 3, False),
    (6, 5, 192, 4, True), (6, 3, 320, 1, False),
)  # fmt: skip


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection; plus the input where shapes are alike."""

    def __init__(self, in_planes: int, planes: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_planes * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormActivation(in_planes, hidden, 1, activation=nn.SiLU))
        layers.append(ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation=nn.SiLU))
        layers.append(SqueezeExcitation(hidden, max(1, in_planes // 4), partial(nn.SiLU, inplace=True), nn.Sigmoid))
        layers.append(ConvNormActivation(hidden, planes, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and in_planes == planes

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class EfficientNet(nn.Module):
    """A stem, seven stages of ``MBConv``, a last 1x1 convolution, one linear classifier."""

    def __init__(
        self,
        wider: float,
        deeper: float,
        dropout: float,
        num_classes: int,
        in_channels: int,
        width: int,
        halvings: int,
    ) -> None:
        super().__init__()
        published = divisible(32 * wider)
        steps = strides(halvings, 5)
        layers: list[nn.Module] = [ConvNormActivation(in_channels, width, 3, steps.pop(0), activation=nn.SiLU)]
        planes = width
        for expansion, kernel, channels, count, halves in _STAGES:
            out_planes = scaled(divisible(channels * wider), width, published)
            blocks = []
            for index in range(math.ceil(count * deeper)):
                stride = steps.pop(0) if halves and index == 0 else 1
                blocks.append(MBConv(planes, out_planes, kernel, stride, expansion))
                planes = out_planes
            layers.append(nn.Sequential(*blocks))
        last = scaled(4 * divisible(320 * wider), width, published)
        layers.append(ConvNormActivation(planes, last, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def efficientnet_b0(num_classes: int = 10, in_channels: int = 3, width: int = 32, halvings: int = 5) -> EfficientNet:
    """EfficientNet-B0; ``width`` channels in the stem (32 as published), five halvings as published, the first of which go."""
    return EfficientNet(1.0, 1.0, 0.2, num_classes, in_channels, width, halvings)


def efficientnet_b3(num_classes: int = 10, in_channels: int = 3, width: int = 40, halvings: int = 5) -> EfficientNet:
    """EfficientNet-B3; options as for B0, 40 channels in the stem as published."""
    return EfficientNet(1.2, 1.4, 0.3, num_classes, in_channels, width, halvings)
