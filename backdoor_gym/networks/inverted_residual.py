"""Inverted residual blocks with squeeze-and-excitation, of MobileNetV3 and EfficientNet."""

from collections.abc import Callable

from torch import Tensor, nn

from .scaling import ConvNormActivation


class SqueezeExcitation(nn.Module):
    """The input times a gate for each channel, from the means of all channels by two 1x1 convolutions (Hu et al., 2018)."""

    def __init__(
        self, planes: int, squeezed: int, activation: Callable[[], nn.Module], gate: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(planes, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, planes, 1)
        self.activation = activation()
        self.scale_activation = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return x * self.scale_activation(self.fc2(scale))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, maybe excitation, 1x1 projection; plus the input where shapes are alike.

    ``excitation`` makes the layer of the hidden channels, None for none of it.
    """

    def __init__(
        self,
        in_planes: int,
        hidden: int,
        planes: int,
        kernel: int,
        stride: int,
        activation: Callable[[], nn.Module],
        excitation: Callable[[int], nn.Module] | None,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hidden != in_planes:
            layers.append(ConvNormActivation(in_planes, hidden, 1, activation=activation, norm=norm))
        layers.append(ConvNormActivation(hidden, hidden, kernel, stride, hidden, activation, norm))
        if excitation is not None:
            layers.append(excitation(hidden))
        layers.append(ConvNormActivation(hidden, planes, 1, activation=None, norm=norm))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and in_planes == planes

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)
