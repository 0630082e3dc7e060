"""MobileNetV3 (Howard et al., 2019): MobileNetV2 with squeeze-and-excitation and hard-swish; the usual checkpoint names."""

from functools import partial

from torch import nn

from .inverted_residual import InvertedResidual, SqueezeExcitation
from .scaling import ConvNormActivation, FeatureNetwork, divisible, scaled, strides

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


class MobileNetV3(FeatureNetwork):
    """A stem, inverted residual blocks, a last 1x1 convolution, and a classifier with one hidden layer.

    ``width`` is the channels of the stem (16 as published); the image is halved five times as published, the first of which go.
    """

    def __init__(
        self,
        stages: tuple,
        last: int,
        hidden: int,
        num_classes: int,
        in_channels: int,
        width: int = 16,
        halvings: int = 5,
    ) -> None:
        super().__init__()
        steps = strides(halvings, 5)
        layers: list[nn.Module] = [
            ConvNormActivation(in_channels, width, 3, steps.pop(0), activation=nn.Hardswish, norm=_NORM)
        ]
        planes = width
        for kernel, expanded, channels, squeezes, swish, halves in stages:
            wide, out_planes = scaled(expanded, width, 16), scaled(channels, width, 16)
            squeezed = scaled(divisible(expanded // 4), width, 16)
            excitation = partial(SqueezeExcitation, squeezed=squeezed, activation=nn.ReLU, gate=nn.Hardsigmoid)
            stride = steps.pop(0) if halves else 1
            activation = nn.Hardswish if swish else nn.ReLU
            layers.append(
                InvertedResidual(
                    planes, wide, out_planes, kernel, stride, activation, excitation if squeezes else None, _NORM
                )
            )
            planes = out_planes
        last, hidden = scaled(last, width, 16), scaled(hidden, width, 16)
        layers.append(ConvNormActivation(planes, last, 1, activation=nn.Hardswish, norm=_NORM))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(last, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, num_classes)
        )


mobilenet_v3_large = partial(MobileNetV3, _LARGE, 960, 1280)
mobilenet_v3_small = partial(MobileNetV3, _SMALL, 576, 1024)
