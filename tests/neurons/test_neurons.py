import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.errors import UnknownNameError, UntraceableError
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.neurons.finding import find_neurons


def test_resnet_neurons_are_named_after_convolutions_in_network_order(network_of):
    neurons = find_neurons(network_of("resnet18"))
    assert len(neurons) == 75 * 8
    assert [layer.name for layer in neurons.layers[:4]] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.1.conv1",
    ]
    assert neurons.names[0] == "conv1[0]"
    assert neurons.names[8 + 5] == "layer1.0.conv1[5]"
    assert neurons.index("layer1.0.conv1[5]") == 13
    assert neurons.layer_index[13] == 1


def test_preact_neurons_are_bn_channels_fed_by_all_convolutions_of_the_sum(network_of):
    neurons = find_neurons(network_of("preact_resnet18"))
    layers = {layer.name: layer for layer in neurons.layers}
    assert {feeder.module for feeder in layers["layer1.1.bn1"].feeders} == {"conv1", "layer1.0.conv2"}
    assert {feeder.module for feeder in layers["layer3.1.bn1"].feeders} == {"layer3.0.conv2", "layer3.0.shortcut.0"}
    # A convolution that one BN alone reads gives its name to the neurons; the last sum has no BN.
    assert layers["layer1.0.conv1"].module == "layer1.0.bn2"
    assert not layers["layer4.1.conv2"].normalised


def test_upstream_layers_of_a_residual_sum_come_nearest_first(network_of):
    neurons = find_neurons(network_of("resnet18"))
    names = [layer.name for layer in neurons.layers]
    reader = neurons.layers[names.index("layer2.0.conv1")]
    assert [names[index] for index in reader.feeders[0].upstream] == ["layer1.1.conv2", "layer1.0.conv2", "conv1"]


def test_residual_groups_join_the_channels_of_a_sum(network_of):
    neurons = find_neurons(network_of("resnet18"))
    units = neurons.units("group")
    together = next(unit for unit in units if 0 in unit)
    assert [neurons.names[neuron] for neuron in together] == ["conv1[0]", "layer1.0.conv2[0]", "layer1.1.conv2[0]"]
    assert sorted(np.concatenate(units).tolist()) == list(range(len(neurons)))
    assert [unit.tolist() for unit in neurons.units("channel")] == [[neuron] for neuron in range(len(neurons))]


def test_linear_and_bare_convolutions_have_neurons_but_the_classifier_has_none():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    layers = find_neurons(network).layers
    assert [(layer.name, layer.size, layer.normalised) for layer in layers] == [("0", 4, False), ("4", 6, False)]


def test_the_network_itself_is_left_as_it_is(network_of):
    network = network_of("resnet18")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    find_neurons(network)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.linear(self.conv(x).mean((2, 3)))


class Inner(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Inner(Branching()), ["layer inner", "must not branch"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ["no prunable neuron", "1, gives the logits"]),
    ],
)
def test_what_cannot_be_handled_is_named(network, words):
    with pytest.raises(UntraceableError) as error:
        find_neurons(network)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_normalisation_behind_the_classifier_makes_no_neurons_of_the_classes():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3))
    assert [layer.name for layer in find_neurons(network).layers] == ["0"]


class WithOption(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4, 2)

    def forward(self, x, features=False):
        x = F.relu(self.conv(x)).mean((2, 3))
        return x if features else self.linear(x)


def test_further_arguments_of_forward_have_their_defaults():
    network = WithOption()
    neurons = find_neurons(network)
    images = torch.rand(3, 1, 8, 8)
    masked = MaskedNetwork(neurons, images)
    torch.testing.assert_close(masked.logits(np.ones(4, dtype=bool)), network(images))


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.linear(self.second(x + F.relu(self.norm(x))).mean((2, 3)))


def test_a_convolution_that_something_else_reads_too_does_not_name_the_neurons_of_its_bn():
    assert [layer.name for layer in find_neurons(Bypassing()).layers] == ["norm", "second"]


class Reshaping(nn.Module):
    def __init__(self, reshape):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.reshape = reshape
        self.hidden = nn.Linear(4, 3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(F.relu(self.hidden(self.reshape(F.relu(self.conv(x))))))


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=[2, 3]),
        lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
        lambda x: F.adaptive_avg_pool2d(x, 1).reshape((x.shape[0], 4)),
        lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(start_dim=1),
        lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    ],
)
def test_ways_to_flatten_are_understood(reshape):
    assert [layer.feeders[0].upstream for layer in find_neurons(Reshaping(reshape)).layers] == [(), (0,)]


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.view(x.size(0), 2, -1).mean(2).repeat(1, 2),
        lambda x: x.mean(1).flatten(1)[:, :4],
        lambda x: x.flatten(2).mean(1)[:, :4],
        lambda x: x.mean((1, 2, 3))[:, None].repeat(1, 4),
    ],
)
def test_beyond_ways_to_mix_channels_nothing_is_followed(reshape):
    assert [layer.feeders[0].upstream for layer in find_neurons(Reshaping(reshape)).layers] == [(), ()]


def test_unknown_names_are_refused(network_of):
    neurons = find_neurons(network_of("vgg16"))
    with pytest.raises(UnknownNameError, match="did you mean"):
        neurons.index("features.0[99]")
    with pytest.raises(UnknownNameError, match="residual mode"):
        neurons.units("both")


def test_a_network_is_traced_while_another_thread_computes(network_of):
    network, busy = network_of("resnet18"), network_of("small_cnn")
    images = torch.rand(4, 1, 8, 8)
    expected = busy(images)
    wrong, done = [], threading.Event()

    def compute():
        while not done.is_set():
            try:
                wrong.append(not torch.equal(busy(images), expected))
            except Exception as error:  # whatever the tracer makes of it
                wrong.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    with ThreadPoolExecutor(3) as pool:
        names = list(pool.map(lambda _: find_neurons(network).names, range(6)))
    done.set()
    thread.join()
    assert len(wrong) > 1
    assert not any(wrong)
    assert all(one == names[0] for one in names)


def test_a_forward_that_goes_through_the_images_one_by_one_is_refused():
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

        def forward(self, x):
            return torch.stack([self.last(self.conv(image[None]).mean((2, 3)))[0] for image in x])

    with pytest.raises(UntraceableError, match="how many images"):
        find_neurons(OneByOne().eval(), torch.rand(4, 1, 8, 8))


class FixedFilter(nn.Module):
    """Convolves with a kernel that its state dict does not hold."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("kernel", torch.randn(6, 1, 3, 3), persistent=persistent)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.hidden(nn.functional.conv2d(images, self.kernel).relu().mean((2, 3))).relu())


@pytest.mark.parametrize("persistent", [True, False])
def test_kernels_that_no_state_dict_holds_have_no_neurons(persistent):
    neurons = find_neurons(FixedFilter(persistent).eval(), torch.rand(2, 1, 8, 8))
    assert [layer.name for layer in neurons.layers] == (["kernel", "hidden"] if persistent else ["hidden"])
    reasons = {account.name: account.reason for account in neurons.left_out}
    assert ("persistent=False" in reasons.get("kernel", "")) is not persistent
