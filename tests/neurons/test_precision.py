"""Forwards that compute in other types than float32: graphs take float32, and notes say so."""

import pytest
import torch
from torch.nn import functional as F

from backdoor_gym import InfectedModel, repair
from backdoor_gym.errors import DataError
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.neurons.precision import InFloat32

from .test_idioms import IMAGES, LABELS, conv, net


def by_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x).float()


def by_function(m, x):
    weight, bias = m.a.weight.half(), m.a.bias.to(torch.float16)
    return F.conv2d(x.type(torch.half), weight, bias, padding=1).relu().float()


FORWARDS = {
    "autocast": (by_autocast, torch.float32, "bfloat16"),
    "casts of weights": (by_function, torch.float32, "float16"),
    "bfloat16 weights": (lambda m, x: m.a(x.bfloat16()).float(), torch.bfloat16, "bfloat16"),
    "float64 weights": (lambda m, x: m.a(x.double()).float(), torch.float64, "float64"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_computed_in_another_type_is_recorded_in_float32(name):
    middle, dtype, said = FORWARDS[name]
    network = net(middle, a=conv().to(dtype))
    neurons = find_neurons(network, IMAGES)
    with InFloat32(), torch.no_grad():
        torch.testing.assert_close(neurons.graph(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    assert (len(neurons), neurons.coverage) == (12, 1)
    assert any(f"computes in {said}," in note for note in neurons.notes)
    assert {layer.weight.dtype for layer in (neurons.graph.stem, neurons.graph.a)} == {torch.float32}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_network_of_other_types_is_repaired_in_its_own(name):
    middle, dtype, _ = FORWARDS[name]
    network = net(middle, a=conv().to(dtype))
    with torch.no_grad():
        network.a.bias += 100  # so that its rounding is no small part of what differs
    before = network(IMAGES)
    result = repair(InfectedModel.from_module(network, clean=(IMAGES, LABELS)), policy="clp", u=1)
    assert result.module.a.weight.dtype == dtype
    assert torch.equal(network(IMAGES), before)


def test_a_float64_that_needs_no_other_weights_stays_one():
    neurons = find_neurons(net(lambda m, x: (m.a(x).double() + 1e-300).log().nan_to_num().float(), a=conv()), IMAGES)
    assert "double" in {node.target for node in neurons.graph.graph.nodes}
    assert neurons.notes == ()


def test_images_that_fit_no_type_are_told_as_before():
    network = net(lambda m, x: m.a(x), a=conv(7)).half()
    with pytest.raises(DataError, match=r"expected input.*to have 7 channels"):
        InfectedModel.from_module(network, clean=(IMAGES, LABELS))
