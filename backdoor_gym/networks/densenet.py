"""DenseNet (Huang et al., 2017): each layer reads the concatenation of all before it; with the usual checkpoint names."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scaling import strides


class DenseLayer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3."""

    def __init__(self, planes: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(planes, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    """Layers of ``growth`` channels each."""

    def __init__(self, count: int, planes: int, growth: int) -> None:
        layers = (DenseLayer(planes + index * growth, growth) for index in range(count))
        super().__init__({f"denselayer{index + 1}": layer for index, layer in enumerate(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1 of half the channels, then a pooling that halves the image."""

    def __init__(self, planes: int, stride: int) -> None:
        layers = OrderedDict[str, nn.Module](norm=nn.BatchNorm2d(planes), relu=nn.ReLU())
        layers["conv"] = nn.Conv2d(planes, planes // 2, 1, bias=False)
        layers["pool"] = nn.AvgPool2d(stride, stride)
        super().__init__(layers)


class DenseNet(nn.Module):
    """A stem of ``width`` channels, dense blocks of growth ``width / 2`` with transitions between, BN, a linear classifier.

    The stem is a 7x7 convolution and a pooling (ImageNet), or a 3x3 convolution (CIFAR).
    """

    def __init__(
        self, blocks: tuple[int, ...], num_classes: int, in_channels: int, width: int, imagenet: bool, halvings: int
    ) -> None:
        super().__init__()
        places = len(blocks) - 1 + 2 * imagenet
        steps = strides(halvings, places)
        layers = OrderedDict[str, nn.Module]()
        if imagenet:
            layers["conv0"] = nn.Conv2d(in_channels, width, 7, steps.pop(0), 3, bias=False)
            layers["norm0"], layers["relu0"] = nn.BatchNorm2d(width), nn.ReLU()
            layers["pool0"] = nn.MaxPool2d(3, steps.pop(0), 1)
        else:
            layers["conv0"] = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        planes = width
        for index, count in enumerate(blocks):
            layers[f"denseblock{index + 1}"] = DenseBlock(count, planes, width // 2)
            planes += count * (width // 2)
            if index < len(blocks) - 1:
                layers[f"transition{index + 1}"] = Transition(planes, steps.pop(0))
                planes //= 2
        layers[f"norm{len(blocks) + 1}"] = nn.BatchNorm2d(planes)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


def densenet(num_classes: int, in_channels: int, width: int = 24, layers: int = 16, halvings: int = 2) -> DenseNet:
    """DenseNet-BC for CIFAR: three blocks of ``layers`` layers (16 make DenseNet-BC-100), growth ``width / 2``."""
    return DenseNet((layers,) * 3, num_classes, in_channels, width, False, halvings)


def densenet121(num_classes: int, in_channels: int, width: int = 64, halvings: int = 5) -> DenseNet:
    """DenseNet-121; the image is halved five times as published, and the first halvings go where there are fewer."""
    return DenseNet((6, 12, 24, 16), num_classes, in_channels, width, True, halvings)


def densenet161(num_classes: int, in_channels: int, width: int = 96, halvings: int = 5) -> DenseNet:
    """DenseNet-161; ``halvings`` as for DenseNet-121."""
    return DenseNet((6, 12, 36, 24), num_classes, in_channels, width, True, halvings)
