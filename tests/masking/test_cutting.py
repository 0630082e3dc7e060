"""What is cut where networks count on channels: in groups, by slices, in an order, by an axis that must not be of one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.masking.cutting import cut_channels
from backdoor_gym.masking.export import write_mask
from backdoor_gym.neurons.finding import find_neurons

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A first layer ``a`` of twelve channels, something that is given the module and these, and a classifier of ``width``."""

    def __init__(self, middle, width=12, **layers):
        super().__init__()
        self.a, self.middle = nn.Conv2d(3, 12, 3), middle
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.middle(self, F.relu(self.a(x))))


def cut(network, **pruned):
    """The network without these channels of its layers, checked to be equal to the one with zeros, and what stopped it."""
    neurons = find_neurons(network, IMAGES)
    mask = np.ones(len(neurons), dtype=bool)
    for layer, channels in pruned.items():
        mask[[neurons.index(f"{layer}[{channel}]") for channel in channels]] = False
    done = cut_channels(network, neurons, mask, IMAGES)
    torch.testing.assert_close(done.network(IMAGES), write_mask(network, neurons, mask)(IMAGES), rtol=1e-4, atol=1e-5)
    return done


def pooled(x):
    return x.mean((2, 3))


def made(middle, **options):
    torch.manual_seed(0)
    return Net(middle, **options).eval()


def test_each_group_of_a_convolution_loses_as_many_channels():
    network = made(
        lambda m, x: pooled(F.relu(m.c(F.relu(m.b(x))))), b=nn.Conv2d(12, 6, 3, groups=3), c=nn.Conv2d(6, 12, 1)
    )
    done = cut(network, a=[0, 1, 2, 6, 7, 9], b=[0, 3, 4, 5])
    b = done.network.b
    assert (done.network.a.out_channels, b.in_channels, b.groups) == (9, 9, 3)  # two, three and one were useless
    assert (b.out_channels, tuple(b.weight.shape[:2])) == (3, (3, 3))
    reason = "b is a convolution in groups, and each has to lose as many"
    assert [stop.split(" could not be cut out: ") for stop in done.stops] == [
        ["3 pruned channels of a", reason],
        ["1 pruned channels of b", reason],
    ]


def test_a_group_of_a_convolution_keeps_a_channel():
    network = made(lambda m, x: pooled(F.relu(m.b(x))), b=nn.Conv2d(12, 12, 3, groups=4))
    done = cut(network, a=range(12), b=[])
    assert (done.network.a.out_channels, done.network.b.groups) == (4, 4)


@pytest.mark.parametrize("second", [2, 4])
def test_groups_of_several_convolutions_are_alike_in_each(second):
    layers = {"b": nn.Conv2d(12, 12, 1, groups=2), "c": nn.Conv2d(12, 12, 1, groups=second)}
    network = made(lambda m, x: pooled(F.relu(m.b(x)) + F.relu(m.c(x))), **layers)
    done = cut(network, a=[0, 1, 2, 3, 5, 6, 9, 10])
    assert done.network.a.out_channels < 12
    assert (done.network.b.groups, done.network.c.groups) == (2, second)


def test_channels_beside_those_that_a_slice_counts_on_are_cut():
    def middle(m, x):
        return pooled(torch.cat([F.relu(x[:, :8] + m.b(x)), x[:, 8:]], 1))

    done = cut(made(middle, b=nn.Conv2d(12, 8, 1)), a=[0, 1, 9, 10], b=[0, 1])
    assert done.network.a.out_channels == 10
    assert done.network.b.out_channels == 8
    assert any(
        "2 pruned channels of a could not be cut out: the network's own forward counts" in stop for stop in done.stops
    )


@pytest.mark.parametrize("left", [0, 1])
def test_an_axis_that_squeeze_would_take_away_stays(left):
    def middle(m, x):
        return F.adaptive_avg_pool2d(F.relu(m.b(x)), 1).squeeze()

    done = cut(made(middle, b=nn.Conv2d(12, 12, 3)), b=range(left, 12))
    assert (done.network.b.out_channels, done.network.head.in_features) == (2, 2)
    assert done.stops == (f"{2 - left} pruned channels of b could not be cut out: a layer keeps two channels at least",)


class Shuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    ("channels", "reason"),
    [
        ([0, 9], "transpose in s puts channels into an order that hangs on their number"),
        ([0, 1, 8], "layer s counts on"),
    ],
)
def test_a_channel_shuffle_that_stops_a_cut_is_named(channels, reason):
    def middle(m, x):
        first, second = m.s(x).chunk(2, dim=1)
        return pooled(F.relu(torch.cat([m.b(first), m.c(second)], 1)))

    network = made(middle, s=Shuffle(), b=nn.Conv2d(6, 6, 1), c=nn.Conv2d(6, 6, 1))
    done = cut(network, a=channels)
    assert done.network.a.out_channels == 12
    assert done.stops
    assert all("pruned channels of a could not be cut out: " + reason in stop for stop in done.stops)
