"""EfficientNet (Tan and Le, 2019): inverted residual blocks with squeeze-and-excitation and SiLU; the usual checkpoint names."""

import math
from functools import partial

from torch import nn

from .inverted_residual import InvertedResidual, SqueezeExcitation
from .scaling import ConvNormActivation, FeatureNetwork, divisible, scaled, strides

# Expansion, kernel, channels, blocks, halving of B0 (table 1).
_STAGES = (
    (1, 3, 16, 1, False), (6, 3, 24, 2, True), (6, 5, 40, 2, True), (6, 3, 80, 3, True), (6, 5, 112, 3, False),
    (6, 5, 192, 4, True), (6, 3, 320, 1, False),
)  # fmt: skip


class EfficientNet(FeatureNetwork):
    """A stem, seven stages of inverted residual blocks, a last 1x1 convolution, one linear classifier.

    Args:
        wider: factor of the channels of B0.
        deeper: factor of its blocks.
        dropout: before the classifier.
        num_classes: number of logits.
        in_channels: of the images.
        width: channels of the stem, None for the published ones.
        halvings: how often the image is halved, five times as published; the first ones go.
    """

    def __init__(
        self,
        wider: float,
        deeper: float,
        dropout: float,
        num_classes: int,
        in_channels: int,
        width: int | None = None,
        halvings: int = 5,
    ) -> None:
        super().__init__()
        published = divisible(32 * wider)
        planes = width = published if width is None else width
        steps = strides(halvings, 5)
        layers: list[nn.Module] = [ConvNormActivation(in_channels, width, 3, steps.pop(0), activation=nn.SiLU)]
        for expansion, kernel, channels, count, halves in _STAGES:
            out_planes = scaled(divisible(channels * wider), width, published)
            blocks = []
            for index in range(math.ceil(count * deeper)):
                stride = steps.pop(0) if halves and index == 0 else 1
                squeezed = max(1, planes // 4)
                excitation = partial(
                    SqueezeExcitation, squeezed=squeezed, activation=partial(nn.SiLU, inplace=True), gate=nn.Sigmoid
                )
                hidden = planes * expansion
                blocks.append(InvertedResidual(planes, hidden, out_planes, kernel, stride, nn.SiLU, excitation))
                planes = out_planes
            layers.append(nn.Sequential(*blocks))
        last = scaled(4 * divisible(320 * wider), width, published)
        layers.append(ConvNormActivation(planes, last, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))


efficientnet_b0 = partial(EfficientNet, 1.0, 1.0, 0.2)
efficientnet_b3 = partial(EfficientNet, 1.2, 1.4, 0.3)
