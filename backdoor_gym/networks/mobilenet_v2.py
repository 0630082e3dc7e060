"""MobileNetV2 (Sandler et al., 2018): depthwise convolutions between linear bottlenecks; with the usual checkpoint names."""

from torch import Tensor, nn

from .scaling import ConvNormActivation, FeatureNetwork, scaled, strides

# Expansion, channels, blocks, and whether the first block halves the image (section 4, table 2).
_STAGES = (
    (1, 16, 1, False), (6, 24, 2, True), (6, 32, 3, True), (6, 64, 4, True), (6, 96, 3, False), (6, 160, 3, True),
    (6, 320, 1, False),
)  # fmt: skip


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection, each with BN; plus the input where shapes are alike."""

    def __init__(self, in_planes: int, planes: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_planes * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormActivation(in_planes, hidden, 1, activation=nn.ReLU6))
        layers.append(ConvNormActivation(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6))
        layers += [nn.Conv2d(hidden, planes, 1, bias=False), nn.BatchNorm2d(planes)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_planes == planes

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(FeatureNetwork):
    """A stem, seventeen inverted residual blocks, a last 1x1 convolution, one linear classifier.

    ``width`` is the channels of the stem (32 as published); the image is halved five times as published, the first of which go.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 32, halvings: int = 5) -> None:
        super().__init__()
        steps = strides(halvings, 5)
        layers: list[nn.Module] = [ConvNormActivation(in_channels, width, 3, steps.pop(0), activation=nn.ReLU6)]
        planes = width
        for expansion, channels, count, halves in _STAGES:
            out_planes = scaled(channels, width, 32)
            for index in range(count):
                stride = steps.pop(0) if halves and index == 0 else 1
                layers.append(InvertedResidual(planes, out_planes, stride, expansion))
                planes = out_planes
        last = scaled(1280, width, 32)
        layers.append(ConvNormActivation(planes, last, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
