"""VGG with or without batch normalisation (Simonyan and Zisserman, 2015, configurations A, B, D and E)."""

from torch import Tensor, nn

from .scaling import strides

# Convolutions of each stage; a stage ends with a 2x2 max pooling. Channels are 1, 2, 4, 8 and 8 times the width.
CONFIGURATIONS = {
    "A": (1, 1, 2, 2, 2),
    "B": (2, 2, 2, 2, 2),
    "D": (2, 2, 3, 3, 3),
    "E": (2, 2, 4, 4, 4),
}
_FACTORS = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """3x3 convolutions with ReLU and, if asked for, BN; poolings; and a linear classifier, or one with two hidden layers."""

    def __init__(
        self,
        configuration: str,
        num_classes: int,
        in_channels: int,
        width: int,
        batch_norm: bool,
        hidden: int,
        halvings: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        planes = in_channels
        stages = zip(CONFIGURATIONS[configuration], _FACTORS, strides(halvings, 5), strict=True)
        for count, factor, stride in stages:
            for _ in range(count):
                layers.append(nn.Conv2d(planes, width * factor, 3, padding=1))
                planes = width * factor
                if batch_norm:
                    layers.append(nn.BatchNorm2d(planes))
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2) if stride == 2 else nn.Identity())
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7 if hidden else 1)
        self.classifier: nn.Module = nn.Linear(planes, num_classes)
        if hidden:
            self.classifier = nn.Sequential(
                nn.Linear(planes * 7 * 7, hidden), nn.ReLU(), nn.Dropout(),
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )  # fmt: skip

        if not batch_norm:  # with PyTorch's own initialisation so many layers without BN do not learn
            for layer in self.features:
                if isinstance(layer, nn.Conv2d):
                    assert layer.bias is not None
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg11(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 64,
    batch_norm: bool = True,
    hidden: int = 0,
    halvings: int = 5,
) -> VGG:
    """VGG-11; options as for ``vgg16``."""
    return VGG("A", num_classes, in_channels, width, batch_norm, hidden, halvings)


def vgg13(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 64,
    batch_norm: bool = True,
    hidden: int = 0,
    halvings: int = 5,
) -> VGG:
    """VGG-13; options as for ``vgg16``."""
    return VGG("B", num_classes, in_channels, width, batch_norm, hidden, halvings)


def vgg16(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 64,
    batch_norm: bool = True,
    hidden: int = 0,
    halvings: int = 5,
) -> VGG:
    """VGG-16; ``hidden`` units in each of two hidden linear layers (4,096 as published, 0 for none of them).

    The image is halved five times as published, and the first poolings go where there are fewer ``halvings``.
    """
    return VGG("D", num_classes, in_channels, width, batch_norm, hidden, halvings)


def vgg19(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 64,
    batch_norm: bool = True,
    hidden: int = 0,
    halvings: int = 5,
) -> VGG:
    """VGG-19; options as for ``vgg16``."""
    return VGG("E", num_classes, in_channels, width, batch_norm, hidden, halvings)


def vgg19_bn(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, hidden: int = 4096, halvings: int = 5
) -> VGG:
    """VGG-19 with BN and its published two hidden layers, as the checkpoints of that name have them."""
    return VGG("E", num_classes, in_channels, width, True, hidden, halvings)
