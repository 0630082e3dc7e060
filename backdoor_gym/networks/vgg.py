"""VGG with or without batch normalisation (Simonyan and Zisserman, 2015, configurations A, B, D and E)."""

from functools import partial

from torch import nn

from .scaling import FeatureNetwork, strides


class VGG(FeatureNetwork):
    """3x3 convolutions with ReLU, and BN if asked for; a 2x2 max pooling behind each of five stages; a linear classifier.

    Args:
        counts: convolutions of each stage.
        num_classes: number of logits.
        in_channels: of the images.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        batch_norm: whether there is BN.
        hidden: units in each of two hidden linear layers (4,096 as published), 0 for none of them.
        halvings: how many poolings there are (five as published); the first ones go.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        width: int = 64,
        batch_norm: bool = True,
        hidden: int = 0,
        halvings: int = 5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        planes = in_channels
        for count, factor, stride in zip(counts, (1, 2, 4, 8, 8), strides(halvings, 5), strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(planes, width * factor, 3, padding=1))
                planes = width * factor
                if batch_norm:
                    layers.append(nn.BatchNorm2d(planes))
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2) if stride == 2 else nn.Identity())
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7 if hidden else 1)
        self.classifier = nn.Linear(planes, num_classes)
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


vgg11 = partial(VGG, (1, 1, 2, 2, 2))
vgg13 = partial(VGG, (2, 2, 2, 2, 2))
vgg16 = partial(VGG, (2, 2, 3, 3, 3))
vgg19 = partial(VGG, (2, 2, 4, 4, 4))


def vgg19_bn(num_classes: int, in_channels: int, width: int = 64, hidden: int = 4096, halvings: int = 5) -> VGG:
    """VGG-19 with BN and its published hidden layers, as the checkpoints of that name have them."""
    return vgg19(num_classes, in_channels, width, True, hidden, halvings)
