"""MobileNetV3 (Howard et al., 2019): MobileNetV2 with squeeze-and-excitation and hard-swish; the usual checkpoint names."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .scaling import ConvNormActivation, divisible, scaled, strides
from .squeeze_excite import SqueezeExcitation

_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)

# Kernel, expanded channels, channels, squeeze-and-excitation, hard-swish, halving (section 5.3, tables 1 and 2).
_LARGE = (
    (3, 16, 16, False, False, False), (3, 64, 24, False, False, True), (3, 72, 24, False, False, False),
    (5, 72, 40, True, False, True), (5, 120, 40, True, False, False), (5, 120, 40, True, False, False),
    (3, 240, 80, False, True, True), (3, 200, 80, False, True, False), (3, 184, 80, False, True, False),
    (3, 184, 80, False, True, False), (3, 480, 112, True, True, False), (3, 672, 112, True, True, False),
    (5, 672, 160, True, True, True), (5, 960, 160, True, True, False), (5, 960, 160, True, True, False),
)  # fmt: skip
_SMALL = (
    (3, 16, 16, True, False, True), (3, 72, 24, False, False, True), (3, 88, 24, False, False, False),
    (5, 96, 40, True, True, True), (5, 240, 40, True, True, False), (5, 240, 40, True, True, False),
    (5, 120, 48, True, True, False), (5, 144, 48, True, True, False), (5, 288, 96, True, True, True),
    (5, 576, 96, True, True, False), (5, 576, 96, True, True, False),
)  # fmt: skip


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection; plus the input where shapes are alike."""

    def __init__(
        self,
        in_planes: int,
        hidden: int,
        planes: int,
        kernel: int,
        stride: int,
        squeezed: int,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hidden != in_planes:
            layers.append(ConvNormActivation(in_planes, hidden, 1, activation=activation, norm=_NORM))
        layers.append(
            ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation=activation, norm=_NORM)
        )
        if squeezed:
            layers.append(SqueezeExcitation(hidden, squeezed, nn.ReLU, nn.Hardsigmoid))
        layers.append(ConvNormActivation(hidden, planes, 1, activation=None, norm=_NORM))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and in_planes == planes

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3(nn.Module):
    """A stem, inverted residual blocks, a last 1x1 convolution, and a classifier with one hidden layer."""

    def __init__(
        self, stages: tuple, last: int, hidden: int, num_classes: int, in_channels: int, width: int, halvings: int
    ) -> None:
        super().__init__()
        steps = strides(halvings, 5)
        layers: list[nn.Module] = [
            ConvNormActivation(in_channels, width, 3, steps.pop(0), activation=nn.Hardswish, norm=_NORM)
        ]
        planes = width
        for kernel, expanded, channels, squeezes, swish, halves in stages:
            wide, out_planes = scaled(expanded, width, 16), scaled(channels, width, 16)
            squeezed = scaled(divisible(expanded // 4), width, 16) if squeezes else 0
            stride = steps.pop(0) if halves else 1
            activation = nn.Hardswish if swish else nn.ReLU
            layers.append(InvertedResidual(planes, wide, out_planes, kernel, stride, squeezed, activation))
            planes = out_planes
        last, hidden = scaled(last, width, 16), scaled(hidden, width, 16)
        layers.append(ConvNormActivation(planes, last, 1, activation=nn.Hardswish, norm=_NORM))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(last, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v3_large(num_classes: int = 10, in_channels: int = 3, width: int = 16, halvings: int = 5) -> MobileNetV3:
    """MobileNetV3-Large; ``width`` channels in the stem (16 as published), five halvings as published, the first of which go."""
    return MobileNetV3(_LARGE, 960, 1280, num_classes, in_channels, width, halvings)


def mobilenet_v3_small(num_classes: int = 10, in_channels: int = 3, width: int = 16, halvings: int = 5) -> MobileNetV3:
    """MobileNetV3-Small; options as for the large one."""
    return MobileNetV3(_SMALL, 576, 1024, num_classes, in_channels, width, halvings)
