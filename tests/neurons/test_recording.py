"""What a record holds of forwards that write into parts of tensors, catch errors, use numpy, or hold another network."""

import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.nn import quantized
from torch.nn import functional as F

from backdoor_gym.errors import UntraceableError
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.neurons.recording import Recorder
from backdoor_gym.neurons.tracing import trace

from ..masking.test_architectures import check_masks
from .test_idioms import IMAGES, conv, net


def add_to_a_part(m, x):
    y = m.a(x)
    y[:, :3] += 1
    return y


def several_parts(m, x):
    y = m.a(x)
    y[:, ::2] *= 2
    y[:, 0].zero_()
    F.relu(y[:, 3:], inplace=True)
    return y


def a_part_of_a_part(m, x):
    y = m.a(x)
    part = y[:, :4]
    part[:, :2] += 1
    part[..., 0][:, 1].mul_(3)
    y[:, 2:] = y[:, 2:] * 2
    return y


def a_part_that_another_wrote_over(m, x):
    y = m.a(x)
    first, second = y[:, :4], y[:, 2:]
    first += 1
    return torch.cat([y, second], 1)[:, 2:8]


@pytest.mark.parametrize("middle", [add_to_a_part, several_parts, a_part_of_a_part])
def test_an_operation_in_place_on_a_part_is_in_the_whole(middle):
    network = net(middle, a=conv())
    torch.testing.assert_close(trace(network, IMAGES)(IMAGES), network(IMAGES).detach())
    check_masks(network, IMAGES)


def test_adding_to_a_part_is_recorded_once():
    network, images = net(add_to_a_part, a=conv()), IMAGES[:2].clone()
    targets = [call.target for call in Recorder(network, images).run(network, images).calls]
    assert [target.__name__ for target in targets if callable(target)].count("set_items") == 1


def test_a_part_that_another_wrote_over_is_refused():
    with pytest.raises(UntraceableError, match="through another view of its memory"):
        trace(net(a_part_that_another_wrote_over, a=conv()), IMAGES)


def branch_in_try(m, x):
    y = m.a(x)
    try:
        if y.max() > 0.1:
            y = y * 2
    except Exception:
        y = y * 3
    return y


def other_error_instead(m, x):
    try:
        return m.a(x) * float(x.max())
    except Exception as error:
        raise KeyError("none of your business") from error


@pytest.mark.parametrize("middle", [branch_in_try, other_error_instead])
def test_a_refusal_that_the_forward_catches_is_one(middle):
    with pytest.raises(UntraceableError, match="reads the values of tensors"):
        trace(net(middle, a=conv()), IMAGES)


class Trying(nn.Module):
    """It tries a layer that cannot take the images, and goes on with another."""

    def __init__(self):
        super().__init__()
        self.broken, self.right = conv(7), conv()

    def forward(self, x):
        try:
            return self.broken(x)
        except RuntimeError:
            return self.right(x)


def test_an_error_that_the_forward_catches_is_none():
    network = net(lambda m, x: m.a(x).relu(), a=Trying())
    nodes = trace(network, IMAGES).graph.nodes
    assert [node.meta["where"] for node in nodes if node.target == "relu"] == [""]  # and not the layer that failed
    assert len(check_masks(network, IMAGES)) == 12


@pytest.mark.parametrize(
    ("middle", "layers"),
    [
        (lambda m, x: m.a(x.reshape(np.prod(x.shape[:2]), 1, 8, 8)).reshape(np.int64(len(x)), 6, 8, 8), (1, 1)),
        (lambda m, x: m.a(x)[:, np.array([5, 4, 3, 2, 1, 0])] * np.float32(0.5) + np.float64(1), (6, 6)),
        (lambda m, x: m.a(x.type(torch.float64).type(m.a.weight.dtype)), (6, 6)),
    ],
    ids=["sizes", "indices and factors", "types"],
)
def test_numbers_of_numpy_and_types_are_taken(middle, layers):
    neurons = check_masks(net(middle, a=conv(*layers)), IMAGES)
    assert neurons.graph(IMAGES[:5]).shape == (5, 3)
    assert neurons.coverage == 1


PACKED = quantized.dynamic.Linear(8, 8)._packed_params._packed_params


@pytest.mark.parametrize(
    ("middle", "cause"),
    [
        (lambda m, x: torch.vmap(lambda image: F.conv2d(image[None], m.a.weight)[0])(x), "torch.vmap"),
        (lambda m, x: torch.from_numpy(m.a(x).detach().numpy()), "gives tensors to numpy"),
        (
            lambda m, x: torch.ops.quantized.linear_dynamic(m.a(x), PACKED, False),
            "gives a ScriptObject to an operation",
        ),
    ],
    ids=["vmap", "numpy", "an object"],
)
def test_what_cannot_be_recorded_is_told_by_its_cause(middle, cause):
    with pytest.raises(UntraceableError, match=cause):
        trace(net(middle, a=conv()), IMAGES)


def test_a_quantised_layer_is_named():
    network = net(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(), b=quantized.dynamic.Linear(6, 6))
    with pytest.raises(UntraceableError, match=r"layer b is quantised.*network of floats"):
        find_neurons(network, IMAGES)


def replaced_forward(network):
    forward = network.forward
    network.forward = lambda x: forward(x) * 2


def replaced_forward_of_a_layer(network):
    forward = network.a.forward
    network.a.forward = lambda x: forward(x) * 2


def hook_with_a_layer(network):
    layer = network.a
    network.stem.register_forward_hook(lambda module, inputs, output: layer(output))


@pytest.mark.parametrize("change", [replaced_forward, replaced_forward_of_a_layer, hook_with_a_layer])
def test_a_function_that_holds_the_network_itself_is_refused(change):
    network = net(lambda m, x: m.a(x), a=conv())
    change(network)
    with pytest.raises(UntraceableError, match="copies of the network run with the weights of the first"):
        trace(network, IMAGES)


def test_a_method_in_the_place_of_forward_is_run():
    network = net(lambda m, x: m.a(x), a=conv())
    forward = type(network).forward
    network.forward = types.MethodType(lambda self, x: forward(self, x) * 2, network)
    assert len(check_masks(network, IMAGES)) == 12
