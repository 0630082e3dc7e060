"""Small networks for the 8x8 digits: plain, residual or pre-activation, quick to train and wide enough to be realistic."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import check_name
from .preact import PreActBlock
from .resnet import BasicBlock


class PlainBlock(nn.Module):
    """conv-BN-ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


SHAPES = {"plain": PlainBlock, "residual": BasicBlock, "preact": PreActBlock}


class SmallCNN(nn.Module):
    """A 3x3 stem at full resolution, then blocks of ``width`` channels; the first and the middle one halve the image."""

    def __init__(
        self, num_classes: int, in_channels: int, width: int = 48, blocks: int = 4, shape: str = "plain"
    ) -> None:
        super().__init__()
        check_name("shape of small_cnn", shape, SHAPES)
        self.stem: nn.Module = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        if shape != "preact":
            self.stem = nn.Sequential(self.stem, nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            *(SHAPES[shape](width, width, stride=2 if i in (0, (blocks + 1) // 2) else 1) for i in range(blocks))
        )
        self.head: nn.Module = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()) if shape == "preact" else nn.Identity()
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.blocks(self.stem(x)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
