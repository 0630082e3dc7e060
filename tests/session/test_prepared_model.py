"""A model made ready: what is found out before any repair begins."""

import pytest
import torch
from torch import nn

from backdoor_gym import InfectedModel, repair
from backdoor_gym.errors import UntraceableError


class Pieces(nn.Module):
    """Works on so many images at a time."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 3)

    def piece(self, images):
        return self.head(self.conv(images).relu().mean((2, 3)))

    def forward(self, images):
        return torch.cat([self.piece(images[start : start + 8]) for start in range(0, len(images), 8)])


class Branch(Pieces):
    """Does something else with many images."""

    def forward(self, images):
        logits = self.piece(images)
        return logits if len(images) < 8 else -logits


@pytest.mark.parametrize("kind", [Pieces, Branch])
@pytest.mark.parametrize("policy", ["clp", "onp"])
def test_a_forward_that_counts_its_images_is_refused(kind, policy):
    torch.manual_seed(0)
    network, images = kind().eval(), torch.rand(40, 1, 8, 8)
    model = InfectedModel.from_module(network, (images, network(images).argmax(1)))
    with pytest.raises(UntraceableError, match=r"other things with 40 images than with three.*pieces of a batch"):
        repair(model, policy)
