"""LeNet-5 (LeCun et al., 1998) with ReLU, max pooling and padded convolutions: no normalisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scaling import scaled


class LeNet(nn.Module):
    """Two 5x5 convolutions, each with a 2x2 pooling, two hidden linear layers, one linear classifier.

    Images are square, of ``image_size`` pixels a side; ``width`` is the channels of the first layer (6 as published).
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 6, image_size: int = 32) -> None:
        super().__init__()
        second, first_hidden, second_hidden = (scaled(count, width, 6) for count in (16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, width, 5, padding=2)
        self.conv2 = nn.Conv2d(width, second, 5, padding=2)
        self.fc1 = nn.Linear(second * (image_size // 4) ** 2, first_hidden)
        self.fc2 = nn.Linear(first_hidden, second_hidden)
        self.fc3 = nn.Linear(second_hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))
