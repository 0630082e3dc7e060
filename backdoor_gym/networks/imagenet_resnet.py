"""ResNet in ImageNet layout: 7x7 stem and max pooling (He et al., 2016), with the usual names of its checkpoints."""

from torch import Tensor, nn
from torch.nn import functional as F

from .scaling import strides


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus a shortcut, then ReLU."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last of four times as many channels, plus a shortcut, then ReLU."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        out_planes = self.expansion * planes
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.downsample = downsample(in_planes, out_planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def downsample(in_planes: int, planes: int, stride: int) -> nn.Module:
    """A 1x1 convolution with BN where shapes change, nothing elsewhere."""
    if stride == 1 and in_planes == planes:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


class ImageNetResNet(nn.Module):
    """Stem, pooling, and four stages of blocks with ``width``, 2, 4 and 8 times ``width`` channels."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        width: int,
        halvings: int,
    ) -> None:
        super().__init__()
        stem, pool, *rest = strides(halvings, 5)
        self.conv1 = nn.Conv2d(in_channels, width, 7, stem, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, pool, 1)
        planes = width
        for stage, (count, first) in enumerate(zip(blocks, (1, *rest), strict=True)):
            layers = []
            for index in range(count):
                layers.append(block(planes, width * 2**stage, first if index == 0 else 1))
                planes = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet18_imagenet(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, halvings: int = 5
) -> ImageNetResNet:
    """ResNet-18; the image is halved five times as published, and the first halvings go where there are fewer."""
    return ImageNetResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, width, halvings)


def resnet34_imagenet(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, halvings: int = 5
) -> ImageNetResNet:
    """ResNet-34; ``halvings`` as for ResNet-18."""
    return ImageNetResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, width, halvings)


def resnet50_imagenet(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, halvings: int = 5
) -> ImageNetResNet:
    """ResNet-50; ``halvings`` as for ResNet-18."""
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, width, halvings)
