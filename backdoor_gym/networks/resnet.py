"""ResNet (He et al., 2016, "Deep Residual Learning"), in CIFAR layout (section 4.2: 3x3 stem, no pooling) and in that of ImageNet.

Parameters have the names of the usual checkpoints: shortcuts are ``shortcut`` in CIFAR layout, ``downsample`` in the other.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from .scaling import Staged, strides


def _shortcut(in_planes: int, planes: int, stride: int) -> nn.Module:
    """A 1x1 convolution with BN where shapes change, nothing elsewhere."""
    if stride == 1 and in_planes == planes:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus a shortcut of that name, then ReLU."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str = "shortcut") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.name = shortcut
        self.add_module(shortcut, _shortcut(in_planes, planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.get_submodule(self.name)(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last of four times as many channels, plus a shortcut of that name, then ReLU."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str = "shortcut") -> None:
        super().__init__()
        out_planes = self.expansion * planes
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.name = shortcut
        self.add_module(shortcut, _shortcut(in_planes, out_planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.get_submodule(self.name)(x))


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(Staged):
    """CIFAR layout: four stages of ``width``, 2, 4 and 8 times ``width`` channels (four times that after a bottleneck)."""

    def __init__(
        self, block: Block, counts: tuple[int, ...], num_classes: int, in_channels: int, width: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        planes = self.add_stages(block, counts, width, width, (1, 2, 2, 2))
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.through_stages(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class ImageNetResNet(Staged):
    """ImageNet layout: 7x7 stem and max pooling; halves the image ``halvings`` times, five as published."""

    def __init__(
        self,
        block: Block,
        counts: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        width: int = 64,
        halvings: int = 5,
    ) -> None:
        super().__init__()
        stem, pool, *rest = strides(halvings, 5)
        self.conv1 = nn.Conv2d(in_channels, width, 7, stem, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, pool, 1)
        planes = self.add_stages(block, counts, width, width, (1, *rest), shortcut="downsample")
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.through_stages(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet18_imagenet = partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2))
resnet34_imagenet = partial(ImageNetResNet, BasicBlock, (3, 4, 6, 3))
resnet50_imagenet = partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3))
