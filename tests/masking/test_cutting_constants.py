"""Pruned channels that give constants: cut out where the layer that reads them can take these up, else kept."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.masking.cutting import cut_channels
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.fill import fill_values
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.neurons.finding import find_neurons

from .test_masked import CASES, images_for

IMAGES = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A first layer ``a`` of twelve channels with a BN, something that is given the module and these, and a classifier."""

    def __init__(self, middle, **layers):
        super().__init__()
        self.a, self.n, self.middle = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), middle
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.middle(self, F.relu(self.n(self.a(x)))).flatten(1))


@torch.no_grad()
def made(middle, **layers):
    network, random = Net(middle, **layers).eval(), torch.Generator().manual_seed(0)
    network(IMAGES)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=random)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=random)
            module.weight.uniform_(0.5, 2, generator=random)
            module.bias.uniform_(0.5, 1.5, generator=random)
    return network


@torch.no_grad()
def cut(network, images=IMAGES, **pruned):
    """The network without these channels of its layers, checked to be equal to the masked and the written one, and the stops."""
    neurons = find_neurons(network, images)
    mask, fill = np.ones(len(neurons), dtype=bool), fill_values(neurons, images)
    for layer, channels in pruned.items():
        mask[[neurons.index(f"{layer}[{channel}]") for channel in channels]] = False
    done = cut_channels(network, neurons, mask, images, fill)
    written = write_mask(network, neurons, mask, fill=fill)(images)
    assert not torch.allclose(written, write_mask(network, neurons, mask)(images), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(done.network(images), written, rtol=1e-4, atol=1e-4)
    masked = MaskedNetwork(neurons, images, fill=fill).logits(mask)
    torch.testing.assert_close(done.network(images), masked, rtol=1e-4, atol=1e-4)
    return done


def test_constants_go_into_a_linear_layer_that_reads_a_flattened_map():
    done = cut(made(lambda m, x: x), a=[0, 5, 7])
    assert done.stops == ()
    assert (done.network.a.out_channels, done.network.n.num_features) == (9, 9)
    assert done.network.head.in_features == 9 * 36


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"dilation": 2},
        {"groups": 3},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_constants_go_into_the_bias_of_a_convolution_that_does_not_pad_with_zeros(options):
    done = cut(made(lambda m, x: F.relu(m.c(x)), c=nn.Conv2d(12, 6, 3, **options)), a=[0, 4, 5, 8], c=[1])
    assert done.network.a.out_channels == (9 if "groups" in options else 8)
    if "groups" not in options:
        assert done.stops == ()
        assert (done.network.c.in_channels, done.network.c.out_channels) == (8, 5)


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_constant_before_a_convolution_that_pads_with_zeros_stays(padding):
    network = made(lambda m, x: F.relu(m.c(x)), c=nn.Conv2d(12, 6, 3, padding=padding))
    done = cut(network, a=[0, 5], c=[1])
    assert (done.network.a.out_channels, done.network.c.out_channels) == (12, 5)
    (stop,) = done.stops
    assert stop == (
        "2 pruned channels of a could not be cut out: c pads what it reads with zeros, and there their constants cannot go "
        "into its bias"
    )


def test_a_channel_that_is_filled_with_zero_is_cut_before_padding_too():
    network = made(lambda m, x: F.relu(m.c(x)), c=nn.Conv2d(12, 6, 3, padding=1))
    with torch.no_grad():
        network.n.bias[3] = -100  # no image gets through the ReLU
    done = cut(network, a=[0, 3])
    assert done.network.a.out_channels == 11
    assert "1 pruned channels of a" in done.stops[0]


@pytest.mark.parametrize("kernel", [1, 3])
def test_constants_go_into_the_mean_of_the_bn_behind_a_convolution_without_a_bias(kernel):
    network = made(
        lambda m, x: F.relu(m.c(x)),
        c=nn.Sequential(nn.Conv2d(12, 6, kernel, bias=False), nn.BatchNorm2d(6)),
    )
    done = cut(network, a=[0, 5, 6], **{"c.0": [2]})
    assert done.stops == ()
    assert (done.network.a.out_channels, done.network.c[1].num_features) == (9, 5)


def test_a_constant_stays_where_no_bias_takes_it_up():
    done = cut(made(lambda m, x: F.relu(m.c(x)), c=nn.Conv2d(12, 6, 3, bias=False)), a=[0, 5])
    assert done.network.a.out_channels == 12
    assert "c has no bias that their constants could go into" in done.stops[0]


def test_constants_of_a_sum_are_cut_together_or_not_at_all():
    def middle(m, x):
        return F.relu(m.d(x) + m.c(x))

    layers = {
        "c": nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)),
        "d": nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)),
    }
    done = cut(made(middle, **layers), **{"a": [3, 4], "c.0": [0, 1], "d.0": [1, 2]})
    assert done.network.a.out_channels == 10
    assert (done.network.c[0].out_channels, done.network.d[0].out_channels) == (5, 5)


def test_constants_of_a_residual_block_of_bn_and_padding():
    def middle(m, x):
        return F.adaptive_avg_pool2d(F.relu(m.d(F.relu(m.c(x))) + x), 1)

    layers = {
        "c": nn.Sequential(nn.Conv2d(12, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        "d": nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)),
    }
    done = cut(made(middle, **layers), **{"a": [0, 3], "c.0": [0, 1], "d.0": [2, 3]})
    assert done.network.c[0].out_channels == 4
    assert done.network.a.out_channels == 12  # channel 3 is a constant at both ends of the sum, but c pads it


def test_a_depthwise_convolution_goes_with_its_channel():
    layers = {"c": nn.Conv2d(12, 12, 3, padding=1, groups=12), "d": nn.Conv2d(12, 6, 1)}
    done = cut(made(lambda m, x: F.relu(m.d(F.relu(m.c(x)))), **layers), a=[0, 1, 2], c=[1, 2])
    assert done.stops == ()
    assert (done.network.a.out_channels, done.network.c.groups, done.network.d.in_channels) == (10, 10, 10)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.gelu(x + 1),
        lambda x: torch.sigmoid(x),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: x * torch.sigmoid(x),
        lambda x: F.avg_pool2d(x, 2),
    ],
)
def test_constants_are_what_arrives_behind_other_operations(between):
    done = cut(made(lambda m, x: F.relu(m.c(between(x))), c=nn.Conv2d(12, 6, 1)), a=[0, 5])
    assert done.stops == ()
    assert done.network.a.out_channels == 10


def test_a_constant_that_borders_change_stays():
    """Where an average counts zeros beside the map; a layer that reads a flattened map takes them up all the same."""
    network = made(lambda m, x: F.relu(m.c(F.avg_pool2d(x, 2, padding=1))), c=nn.Conv2d(12, 6, 1))
    done = cut(network, a=[0, 5])
    assert done.network.a.out_channels == 12
    assert "what c reads of them is not the same everywhere" in done.stops[0]
    done = cut(made(lambda m, x: F.avg_pool2d(x, 2, padding=1)), a=[0, 5])
    assert (done.stops, done.network.a.out_channels) == ((), 10)


def test_a_channel_that_only_happens_to_be_constant_stays():
    network = made(lambda m, x: F.relu(m.c(x)), c=nn.Conv2d(12, 6, 1))
    with torch.no_grad():
        network.n.bias[3] = -100  # dead on all images, and not pruned
    done = cut(network, a=[0, 5])
    assert done.network.a.out_channels == 10


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(24, 12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x):
        x = F.gelu(self.a(x.flatten(2).reshape(len(x), 8, 24)))
        return self.head(F.relu(self.b(x)).mean(1))


def test_entries_of_vectors():
    done = cut(Vectors().eval(), a=[0, 5], b=[1])
    assert done.stops == ()
    assert (done.network.a.out_features, done.network.b.out_features) == (10, 8)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_cutting_keeps_the_outputs(network_of, name, options):
    network, images = network_of(name, **options), images_for(name)
    neurons = find_neurons(network)
    fill, random = fill_values(neurons, images), np.random.default_rng(0)
    mask = random.random(len(neurons)) > 0.3
    for unit in neurons.units("group")[::4]:
        mask[unit] = False
    done = cut_channels(network, neurons, mask, images, fill)
    with torch.no_grad():
        expected = write_mask(network, neurons, mask, fill=fill)(images)
        torch.testing.assert_close(done.network(images), expected, rtol=1e-4, atol=1e-4)
    assert any("with zeros" in stop for stop in done.stops)
