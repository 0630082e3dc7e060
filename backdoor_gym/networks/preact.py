"""Pre-activation ResNet (He et al., 2016, "Identity Mappings") and Wide ResNet (Zagoruyko and Komodakis, 2016), in CIFAR layout."""

from torch import Tensor, nn
from torch.nn import functional as F

from .scaling import Staged


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus a shortcut that leaves behind the first activation."""

    expansion = 1

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
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet18(Staged):
    """As in the checkpoints commonly exchanged for it, nothing normalises the last sum before the classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        planes = self.add_stages(PreActBlock, (2, 2, 2, 2), width, width, (1, 2, 2, 2))
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.through_stages(self.conv1(x)), 1).flatten(1))


class WideResNet16(Staged):
    """WRN-16-``widen``: a stem of ``width`` channels (16 as published), three stages, BN-ReLU, a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 16, widen: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        planes = self.add_stages(PreActBlock, (2, 2, 2), width, width * widen, (1, 2, 2))
        self.bn1 = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.through_stages(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
