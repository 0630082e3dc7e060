"""VGG-16 with batch normalisation for 32x32 images (Simonyan and Zisserman, 2015, configuration D)."""

from torch import Tensor, nn

# Channels in units of the width; None is a 2x2 max pooling.
CONFIGURATION_D = (1, 1, None, 2, 2, None, 4, 4, 4, None, 8, 8, 8, None, 8, 8, 8, None)


class VGG(nn.Module):
    """Thirteen 3x3 convolutions, each with BN and ReLU, five poolings, one linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        planes = in_channels
        for factor in CONFIGURATION_D:
            if factor is None:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(planes, width * factor, 3, padding=1), nn.BatchNorm2d(width * factor), nn.ReLU()]
            planes = width * factor
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg16(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> VGG:
    """VGG-16 with BN; images of at least 32x32 pixels."""
    return VGG(num_classes, in_channels, width)
