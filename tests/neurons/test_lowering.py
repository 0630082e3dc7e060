"""Calls of functions that become layers, and which parameters' rows are theirs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.neurons.lowering import Lowered, lower
from backdoor_gym.neurons.parameters import Parameters
from backdoor_gym.neurons.recording import Call, Named, Ref, Tape

X = torch.rand(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "weight": torch.rand(6, generator=torch.Generator().manual_seed(1)),
    "bias": torch.rand(6, generator=torch.Generator().manual_seed(2)),
    "mean": torch.rand(6, generator=torch.Generator().manual_seed(3)),
    "variance": torch.rand(6, generator=torch.Generator().manual_seed(4)) + 0.5,
    "kernel": torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(5)),
    "matrix": torch.rand(4, 5, generator=torch.Generator().manual_seed(6)),
    "line": torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(7)),
    "bias4": torch.rand(4, generator=torch.Generator().manual_seed(8)),
    "weight5": torch.rand(5, generator=torch.Generator().manual_seed(9)),
}
W, B, MEAN, VARIANCE = Named("weight"), Named("bias"), Named("mean"), Named("variance")
IMAGES = Ref(-1)


def value(argument):
    return TENSORS[argument.name] if isinstance(argument, Named) else None


def call(function, *args, x=X, **kwargs):
    """The call on the images, and what it gives."""
    given = [x if arg is IMAGES else TENSORS[arg.name] if isinstance(arg, Named) else arg for arg in args]
    options = {key: TENSORS[arg.name] if isinstance(arg, Named) else arg for key, arg in kwargs.items()}
    return Call("call_function", function, args, kwargs, function(*given, **options), True, "")


@pytest.mark.parametrize(
    ("made", "layer"),
    [
        (call(F.conv2d, IMAGES, Named("kernel"), Named("bias4"), 2, 1, 1, 2), nn.Conv2d),
        (call(F.conv2d, IMAGES, Named("kernel"), groups=2, padding="same"), nn.Conv2d),
        (call(F.conv1d, IMAGES, Named("line"), x=X[:, :, 0]), nn.Conv1d),
        (call(F.linear, IMAGES, Named("matrix"), bias=Named("bias4")), nn.Linear),
        (call(F.batch_norm, IMAGES, MEAN, VARIANCE, W, B, False, 0.1, 1e-3), nn.BatchNorm2d),
        (call(F.batch_norm, IMAGES, MEAN, VARIANCE), nn.BatchNorm2d),
        (call(F.batch_norm, IMAGES, MEAN, VARIANCE, W, B, x=X[:, :, 0]), nn.BatchNorm1d),
        (call(torch.batch_norm, IMAGES, W, B, MEAN, VARIANCE, False, 0.1, 1e-3, False), nn.BatchNorm2d),
        (call(F.layer_norm, IMAGES, (5,), Named("weight5")), nn.LayerNorm),
        (call(F.group_norm, IMAGES, 3, W, B), nn.GroupNorm),
        (call(F.instance_norm, IMAGES, weight=W, bias=B), nn.InstanceNorm2d),
        (call(torch.instance_norm, IMAGES, W, B, None, None, True, 0.1, 1e-3, False), nn.InstanceNorm2d),
    ],
)
def test_a_call_becomes_a_layer_that_gives_the_same(made, layer):
    module, bound = lower(made, value)
    assert isinstance(module, layer)
    assert not module.training
    assert bound["input"] is IMAGES
    x = X[:, :, 0] if layer in (nn.Conv1d, nn.BatchNorm1d) else X
    torch.testing.assert_close(module(x), made.result)
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    "made",
    [
        call(F.relu, IMAGES),
        call(F.linear, IMAGES, IMAGES, x=X[0, 0]),  # weights that come from the images
        call(F.linear, Named("matrix"), Named("matrix")),  # of parameters alone
        call(F.conv2d, IMAGES, Named("kernel"), groups=2, x=X[0]),  # an image without a batch
        call(F.batch_norm, IMAGES, None, None, W, B, True),  # the statistics of the batch
        call(F.batch_norm, IMAGES, MEAN, VARIANCE, x=X[..., None]),  # of volumes
        call(F.group_norm, IMAGES, 3),
        call(F.instance_norm, IMAGES, MEAN, VARIANCE, W, B, False),
    ],
)
def test_other_calls_are_no_layers(made):
    assert lower(made, value) is None


def test_a_method_is_no_layer():
    assert lower(Call("call_method", "relu", (IMAGES,), {}, X, True, ""), value) is None


@pytest.mark.parametrize(
    ("weight", "bias", "writable"),
    [
        ((("w", 0),), (), True),
        ((("w", 0),), (("b", 0),), True),
        (None, (), False),
        ((), (), False),
        ((("w", 0),), None, False),
    ],
)
def test_zeros_can_be_written_where_rows_of_weight_and_bias_are_known(weight, bias, writable):
    assert Lowered("layer", weight, bias).writable is writable


def parameters_of(compute):
    """What a record of a computation from two parameters knows of its result."""
    tensors = {"a": torch.rand(3, 2) + 0.5, "b": torch.rand(4, 2) + 0.5}
    tape = Tape(torch.Size([2, 3, 8, 8]))
    function, args = compute
    result = function(
        *torch.fx.node.map_aggregate(args, lambda arg: tensors[arg.name] if isinstance(arg, Named) else arg)
    )
    tape.calls.append(Call("call_function", function, args, {}, result, False, ""))
    parameters = Parameters(tensors, tape)
    parameters.constant.append(True)
    return parameters


@pytest.mark.parametrize(
    ("compute", "written"),
    [
        ((torch.cat, ([Named("b"), Named("a")],)), (("b", 0), ("a", 4))),
        ((torch.cat, ([Named("a"), Named("b")],)), (("b", 3), ("a", 0))),
        ((torch.mul, (Named("a"), 2.0)), (("a", 0),)),
        ((F.pad, (Named("a"), (0, 0, 2, 1))), (("a", 2),)),  # beside rows of zeros
        ((torch.flip, (Named("a"), (0,))), None),  # rows in another order
        ((torch.add, (Named("a"), 1.0)), None),  # zeros do not stay zeros
        ((torch.softmax, (Named("a"), 0)), None),  # other rows change
        ((torch.t, (Named("a"),)), None),
    ],
)
def test_where_zeros_of_parameters_arrive(compute, written):
    parameters = parameters_of(compute)
    assert parameters.written(Ref(0)) == written
    assert set(parameters.read(Ref(0))) == {name for name in "ab" if f"'{name}'" in repr(compute)}


def test_parameters_themselves_are_written_nothing_has_no_rows_and_images_cannot_be_written():
    parameters = parameters_of((torch.mul, (Named("a"), 2.0)))
    assert parameters.written(Named("a")) == (("a", 0),)
    assert parameters.written(None) == ()
    assert parameters.written(Ref(-1)) is None
    assert parameters.value(Ref(-1)) is None
