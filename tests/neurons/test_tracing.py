"""What two records become: numbers that grow with the batch, constants, names of layers, and what is refused."""

import operator
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.errors import UntraceableError
from backdoor_gym.neurons.canonical import canonical, changed, set_items
from backdoor_gym.neurons.joining import Joiner, is_number
from backdoor_gym.neurons.recording import Named, Recorder, Ref
from backdoor_gym.neurons.tracing import same_logits, trace

from ..masking.test_architectures import check_masks

IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """A linear layer, and a forward that a test brings."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.written = nn.Linear(48, 4), forward

    def forward(self, x):
        return self.written(self, x)


def record(forward, count):
    network = Written(forward)
    images = IMAGES[:count].clone()
    return network, Recorder(network, images).run(network, images)


def test_a_record_refers_to_images_calls_parts_parameters_and_values():
    constant = torch.ones(2)
    _, tape = record(lambda m, x: m.linear(x.flatten(1)).chunk(2, 1)[1] + constant, 2)
    flatten, linear, chunk, add = tape.calls
    assert (flatten.op, flatten.target, flatten.args) == ("call_method", "flatten", (Ref(-1), 1))
    assert linear.target is F.linear
    assert linear.args == (Ref(0), Named("linear.weight"), Named("linear.bias"))
    assert (linear.where, add.where) == ("linear", "")
    assert chunk.shapes == [torch.Size([2, 2])] * 2
    assert add.target is operator.add
    assert add.args[0] == Ref(2, 1)
    assert add.args[1].tensor is constant
    assert tape.output == Ref(3)
    assert tape.result(Ref(2, 1)) is chunk.result[1]


@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        (lambda n: n, 1),  # the size itself
        (lambda n: 3 * n, 2),  # times 3
        (lambda n: n + 7, 2),  # plus 7
        (lambda n: 2 * n - 1, 3),
        (lambda n: 9, 0),
    ],
)
def test_a_number_that_grows_with_the_images_is_computed_from_how_many_there_are(size, numbers):
    def forward(m, x):
        padded = F.pad(m.linear(x.flatten(1)), (0, 0, 0, size(len(x))))
        return padded[: len(x)]

    graph_module = trace(Written(forward), IMAGES)
    counted = [node for node in graph_module.graph.nodes if is_number(node)]
    assert len(counted) == max(numbers, 1)  # the slice counts as well
    for images in (IMAGES[:1], IMAGES, torch.cat([IMAGES, IMAGES])):
        torch.testing.assert_close(graph_module(images), Written(forward)(images))


def test_the_same_number_is_computed_once():
    def forward(m, x):
        x = m.linear(x.flatten(1)).reshape(2 * len(x), 2)
        return (x * 2).reshape(2 * (len(x) // 2), 2).reshape(len(x) // 2, 4)

    nodes = [node for node in trace(Written(forward), IMAGES).graph.nodes if is_number(node)]
    assert [node.target for node in nodes] == ["size", operator.mul]


def test_what_depends_on_parameters_alone_becomes_a_constant_that_says_so():
    graph_module = trace(Written(lambda m, x: m.linear(x.flatten(1)) * m.linear.weight.norm()), IMAGES)
    constant = next(node for node in graph_module.graph.nodes if node.op == "get_attr")
    assert (constant.meta["read"], constant.meta["parameter"]) == (("linear.weight",), None)
    graph_module = trace(Written(lambda m, x: m.linear(x.flatten(1)) * m.linear.bias), IMAGES)
    constant = next(node for node in graph_module.graph.nodes if node.op == "get_attr")
    assert (constant.meta["read"], constant.meta["parameter"]) == (("linear.bias",), "linear.bias")


def test_a_device_is_that_of_the_images():
    graph_module = trace(
        Written(lambda m, x: m.linear(x.flatten(1)) + torch.arange(len(x), device=x.device)[:1]), IMAGES
    )
    assert any(node.target is getattr and node.args[1] == "device" for node in graph_module.graph.nodes)


def test_a_layer_is_named_after_its_weight_and_uses_with_other_tensors_apart():
    def forward(m, x):
        x = m.linear(x.flatten(1))
        return F.linear(x, m.linear.weight[:, :4]) + F.linear(x, m.linear.weight[:, 4:8])

    meta = trace(Written(forward), IMAGES).meta
    assert list(meta["lowered"]) == ["linear", "linear_use2", "linear_use3"]
    assert [layer.is_plain for layer in meta["lowered"].values()] == [True, False, False]
    assert [layer.weight for layer in meta["lowered"].values()] == [(("linear.weight", 0),)] * 3
    assert meta["parameters"] == {"linear.weight": 2, "linear.bias": 1}


#: Names that are code, no text at all in code, another name by Unicode's or our rules, or what graphs and layers have themselves.
NAMES = (
    'x", print("run")) or getattr(self, "x', 'a"b', "a\\", "a\nb", "a b", "a_b", "\ufb01", "fi", " ", "_graph", "_tensor_0",
    "_units_0_0", "neuron_mask_0", "stride", "class", "0",
)  # fmt: skip


def test_names_of_layers_never_become_code(capsys):
    torch.manual_seed(0)
    network = nn.Sequential()
    for name in NAMES:
        network.add_module(name, nn.Conv2d(3, 3, 1))
        network[-1].load_state_dict(network[0].state_dict())  # layers that are told apart by their names alone
    network.add_module("flat", nn.Flatten())
    network.add_module("out", nn.Linear(48, 3))
    lowered = trace(network.eval(), IMAGES).meta["lowered"]
    assert [layer.name for layer in lowered.values()] == [*NAMES, "out"]
    assert all(re.fullmatch("[0-9A-Za-z_]+", name) for name in lowered)
    assert {layer.name for layer in lowered.values() if not layer.is_plain}.isdisjoint(("0", "out", "fi"))
    neurons = check_masks(network, IMAGES)
    assert neurons.names[:2] == [f"{NAMES[0]}[0]", f"{NAMES[0]}[1]"]
    assert capsys.readouterr().out == ""


def test_a_name_that_no_file_can_hold_is_refused():
    with pytest.raises(UntraceableError, match="no file can hold the name"):
        trace(nn.Sequential(OrderedDict({"\ud800": nn.Linear(3, 3)})), IMAGES)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda m, x: m.linear(x.flatten(1)), lambda m, x: m.linear(x.flatten(1)).relu()),  # one call more
        (lambda m, x: m.linear(x.flatten(1)).relu(), lambda m, x: m.linear(x.flatten(1)).tanh()),
        (lambda m, x: m.linear(x.flatten(1)) * 0.5, lambda m, x: m.linear(x.flatten(1)) * 0.25),
        (lambda m, x: m.linear(x.flatten(1)) * 2, lambda m, x: m.linear(x.flatten(1)) * 2.0),
        (lambda m, x: m.linear(x.flatten(1)).sum((1,)), lambda m, x: m.linear(x.flatten(1)).sum((1, 0))),
        (
            lambda m, x: (lambda y: y.relu() + y.relu())(m.linear(x.flatten(1))),
            lambda m, x: (lambda y: y.relu() + y.relu().mul(1) if len(y) == 2 else y.relu().add(y))(
                m.linear(x.flatten(1))
            ),
        ),
    ],
)
def test_records_that_differ_otherwise_are_refused(first, second):
    network, two = record(first, 2)
    _, three = record(second, 3)
    with pytest.raises(UntraceableError, match="does other things with two images than with three"):
        Joiner(network, two, three).join()


def test_a_tensor_that_no_operation_made_must_be_the_same_in_both():
    values = [torch.zeros(4), torch.ones(4)]
    network, two = record(lambda m, x: m.linear(x.flatten(1)) + values[0], 2)
    _, three = record(lambda m, x: m.linear(x.flatten(1)) + values[1], 3)
    with pytest.raises(UntraceableError, match="another one in each pass"):
        Joiner(network, two, three).join()


def test_not_a_number_is_the_same_in_both_records():
    graph_module = trace(Written(lambda m, x: torch.nan_to_num(m.linear(x.flatten(1)), nan=float("nan"))), IMAGES)
    assert graph_module(IMAGES).shape == (5, 4)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((torch.Tensor.__rsub__, (Ref(0), 1), {}), (operator.sub, (1, Ref(0)), {})),
        ((torch.Tensor.add_, (Ref(0), Ref(1)), {}), (operator.add, (Ref(0), Ref(1)), {})),
        ((torch.Tensor.add_, (Ref(0), Ref(1)), {"alpha": 2}), ("add", (Ref(0), Ref(1)), {"alpha": 2})),
        ((torch.Tensor.__imul__, (Ref(0), 2), {}), (operator.mul, (Ref(0), 2), {})),
        ((torch.Tensor.neg, (Ref(0),), {}), (operator.neg, (Ref(0),), {})),
        ((torch.Tensor.zero_, (Ref(0),), {}), (changed, (Ref(0), "zero_"), {})),
        ((torch.Tensor.view, (Ref(0), 2, -1), {}), ("reshape", (Ref(0), 2, -1), {})),
        ((torch.Tensor.view, (Ref(0), torch.int32), {}), ("view", (Ref(0), torch.int32), {})),
        ((torch.Tensor.squeeze, (Ref(0),), {}), ("squeeze", (Ref(0), (2, 3)), {})),
        ((torch.Tensor.__setitem__, (Ref(0), 0, 1), {}), (set_items, (Ref(0), 0, 1), {})),
        ((F.relu, (Ref(0),), {"inplace": True}), (F.relu, (Ref(0),), {})),
        ((torch.relu_, (Ref(0),), {}), (torch.relu, (Ref(0),), {})),
        ((torch.Tensor.T.__get__, (Ref(0),), {}), (getattr, (Ref(0), "T"), {})),
    ],
)
def test_calls_are_written_in_one_way(call, expected):
    function, args, kwargs = call
    op, *rest = canonical(function, args, kwargs, (2, 3, 1, 1))
    assert tuple(rest) == expected
    assert op == ("call_method" if isinstance(expected[0], str) else "call_function")


def test_logits_are_the_same_up_to_rounding_of_the_largest():
    expected = torch.tensor([[1000.0, 0.0]])
    assert same_logits(expected + 0.5, expected, 1e-3)
    assert not same_logits(expected + 2, expected, 1e-3)
    assert not same_logits(expected * float("nan"), expected, 1e-3)
    assert not same_logits(expected[0], expected, 1e-3)
    assert not same_logits("logits", expected, 1e-3)
