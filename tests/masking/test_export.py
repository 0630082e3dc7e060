import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.errors import CompactionError
from backdoor_gym.masking.cutting import cut_channels
from backdoor_gym.masking.export import write_mask
from backdoor_gym.neurons.finding import find_neurons

from .test_masked import CASES, images_for


def test_a_written_mask_zeroes_the_bn_and_nothing_else(network_of):
    network = network_of("resnet18")
    neurons = find_neurons(network)
    mask = np.ones(len(neurons), dtype=bool)
    mask[neurons.index("layer2.0.conv1[5]")] = False
    edited = write_mask(network, neurons, mask)
    for key, value in network.state_dict().items():
        other = edited.state_dict()[key].clone()
        if key in ("layer2.0.bn1.weight", "layer2.0.bn1.bias"):
            assert other[5] == 0
            other[5] = value[5]
        assert torch.equal(value, other), key
    assert edited is not network
    assert write_mask(network, neurons, mask, inplace=True) is network


@pytest.mark.parametrize(("name", "options"), CASES)
def test_cutting_keeps_the_outputs(network_of, name, options):
    network = network_of(name, **options)
    neurons = find_neurons(network)
    random = np.random.default_rng(0)
    mask = random.random(len(neurons)) > 0.3
    for unit in neurons.units("group")[::4]:
        mask[unit] = False
    images = images_for(name)
    smaller = cut_channels(network, neurons, mask, images).network
    edited = write_mask(network, neurons, mask)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), edited(images), rtol=1e-4, atol=1e-4)
    size = sum(parameter.numel() for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in smaller.parameters()) < 0.8 * size


def test_a_channel_that_a_residual_sum_still_needs_is_not_cut(network_of):
    network = network_of("resnet18")
    neurons = find_neurons(network)
    mask = np.ones(len(neurons), dtype=bool)
    mask[neurons.index("layer1.0.conv2[2]")] = False  # conv1[2] and layer1.1.conv2[2] still write this channel
    smaller = cut_channels(network, neurons, mask, images_for("resnet18")).network
    assert smaller.layer1[0].conv2.weight.shape == network.layer1[0].conv2.weight.shape


def test_a_layer_never_loses_its_last_channels(network_of):
    network = network_of("vgg16")
    neurons = find_neurons(network)
    mask = np.ones(len(neurons), dtype=bool)
    mask[neurons.layers[3].neurons] = False
    smaller = cut_channels(network, neurons, mask, images_for("vgg16")).network
    assert smaller.features[10].out_channels == 2  # of a single one ``squeeze()`` would take the axis away


def test_channels_behind_a_sigmoid_are_not_cut_since_zero_does_not_stay_zero():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    neurons = find_neurons(network)
    mask = np.ones(len(neurons), dtype=bool)
    mask[[0, 5]] = False
    smaller = cut_channels(network, neurons, mask, torch.rand(4, 1, 8, 8)).network
    assert smaller[0].out_channels == 4
    assert smaller[2].out_channels == 3


def test_channels_that_a_depthwise_convolution_reads_stay_and_others_go():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 3),
    ).eval()  # fmt: skip
    neurons = find_neurons(network)
    mask = np.ones(len(neurons), dtype=bool)
    mask[[1, 9]] = False
    images = torch.rand(4, 1, 8, 8)
    smaller = cut_channels(network, neurons, mask, images).network
    assert (smaller[0].out_channels, smaller[4].out_channels) == (4, 5)
    torch.testing.assert_close(smaller(images), write_mask(network, neurons, mask)(images), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_cut_is_refused_by_name(network_of):
    network = network_of("vgg16")
    neurons = find_neurons(network)
    mask = np.ones(len(neurons), dtype=bool)
    mask[0] = False
    with pytest.raises(CompactionError, match="VGG"):
        cut_channels(network, neurons, mask, torch.rand(2, 5, 32, 32))  # images of a wrong shape
