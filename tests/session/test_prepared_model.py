"""A model made ready: what is found out before any repair begins."""

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym import InfectedModel, repair
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import UntraceableError, WeightsError


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


class Normed(nn.Module):
    """Divides by a norm, which is zero once enough neurons are."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, images):
        values = self.conv(images).relu().mean((2, 3))
        return self.head(values / values.norm(dim=1, keepdim=True))


def test_a_prune_after_which_the_network_gives_nan_is_undone():
    torch.manual_seed(0)
    network, images = Normed().eval(), torch.rand(40, 1, 8, 8)
    network.conv.bias.data.fill_(1.0)
    model = InfectedModel.from_module(network, (images, network(images).argmax(1)))
    env = BackdoorPruneEnv(model, accuracy_budget=None)
    env.reset(seed=0)
    for unit in range(3):
        assert not env.step(unit)[4]["undone"]
    observation, reward, *_, info = env.step(3)
    assert info["undone"]
    assert info["pruned"] == 3
    assert np.isfinite(reward)
    assert all(np.isfinite(value).all() for value in observation.values())
    with pytest.raises(WeightsError, match="not finite"):
        env.session.peek([3])
