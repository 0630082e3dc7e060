"""Wide ResNet of depth 16 (Zagoruyko and Komodakis, 2016), pre-activation, for CIFAR-size images."""

from torch import Tensor, nn
from torch.nn import functional as F

from .preact import PreActBlock


class WideResNet(nn.Module):
    """A 3x3 stem of ``stem`` channels, three stages of pre-activation blocks, BN-ReLU, one linear classifier."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, stem: int, widen: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        planes = stem
        for stage in range(3):
            out_planes = stem * widen * 2**stage
            layers = []
            for block in range(blocks):
                layers.append(PreActBlock(planes, out_planes, stride=2 if stage > 0 and block == 0 else 1))
                planes = out_planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.bn1 = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in range(3):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        out = F.relu(self.bn1(out))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)


def wrn16(num_classes: int = 10, in_channels: int = 3, width: int = 16, widen: int = 1) -> WideResNet:
    """WRN-16-``widen``; ``width`` is the number of channels of the stem (16 as published)."""
    return WideResNet(2, num_classes, in_channels, stem=width, widen=widen)
