"""A small network, whose weights tests write into files of many kinds."""

import pytest
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.deep(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    return Net()


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}
