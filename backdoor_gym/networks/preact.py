"""PreAct-ResNet-18 in CIFAR layout (He et al., 2016, "Identity Mappings in Deep Residual Networks").

As in the checkpoints commonly exchanged for it, nothing normalises the last residual sum before the classifier.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus a shortcut that leaves behind the first activation."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PreActResNet(nn.Module):
    """Stages of ``PreActBlock`` with ``width``, 2, 4, ... times ``width`` channels."""

    def __init__(self, blocks: tuple[int, ...], num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        planes = width
        for stage, count in enumerate(blocks):
            out_planes = width * 2**stage
            layers = []
            for block in range(count):
                layers.append(PreActBlock(planes, out_planes, stride=2 if stage > 0 and block == 0 else 1))
                planes = out_planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.num_stages = len(blocks)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in range(self.num_stages):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)


def preact_resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> PreActResNet:
    """PreAct-ResNet-18 with ``width`` channels in its first stage."""
    return PreActResNet((2, 2, 2, 2), num_classes, in_channels, width)
