"""Calls of functions with weights as plain layers: the one form in which all that follows meets them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recording import Call

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
#: Arguments of the functions that become layers.
_ARGUMENTS = {
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}
#: Arguments of a layer that are tensors.
TENSORS = ("weight", "bias", "running_mean", "running_var")
#: The arguments of functions that take them in another order.
_ORDERS: dict[Any, tuple[str, ...]] = {
    torch.batch_norm: ("input", *TENSORS, "training", "momentum", "eps"),
    torch.instance_norm: ("input", *TENSORS, "use_input_stats", "momentum", "eps"),
}
_DEFAULTS = {
    "bias": None, "weight": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "training": False, "eps": 1e-5,
}  # fmt: skip


class GroupNorm(nn.GroupNorm):
    """The same where torch would end the process: its backward pass on the CPU, for weights and bias alone.

    Of channels-last values whose own gradient is not asked for, as where masks are learned on the first normalisation of a
    frozen network, torch 2.13 writes that gradient all the same, to address 0.
    """

    def forward(self, values: Tensor) -> Tensor:
        learned = any(value is not None and value.requires_grad for value in (self.weight, self.bias))
        if learned and torch.is_grad_enabled():
            # Not ``contiguous()``: values of one channel are of both orders at once, and torch takes them for channels-last.
            values = values.clone(memory_format=torch.contiguous_format)
        return super().forward(values)


@dataclass(frozen=True)
class Lowered:
    """Where a layer of the graph comes from.

    Attributes:
        name: of the module that has the weight, as a rule.
        weight: the parameters whose rows make up the rows of the layer's weight, each with the first row that it makes; a
            single one as a rule. None where zeros written into parameters do not zero single rows of the weight.
        bias: likewise, empty where there is none.
        tensors: all parameters and buffers that its weight, bias and statistics are, or are computed from.
        is_plain: whether the network has a module of that name in the graph with that very weight.
        plain_bias: whether its bias is a parameter as it is, so that any value written there is what the layer adds.
    """

    name: str
    weight: tuple[tuple[str, int], ...] | None
    bias: tuple[tuple[str, int], ...] | None
    tensors: tuple[str, ...] = ()
    is_plain: bool = False
    plain_bias: bool = False

    @property
    def writable(self) -> bool:
        """Whether zeros written into rows of parameters zero the same outputs of the layer, and no others."""
        return bool(self.weight) and self.bias is not None


def lower(call: Call, value: Callable[[Any], Tensor | None]) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """The layer that a call is, and its arguments by name; None where it is none.

    ``value`` gives the tensor that an argument is in every pass, None where it is another in each.
    """
    function = getattr(call.target, "__name__", "")
    if call.op != "call_function" or function not in _ARGUMENTS:
        return None
    order = _ORDERS.get(call.target, _ARGUMENTS[function])
    bound = _DEFAULTS | dict(zip(order, call.args, strict=False)) | call.kwargs
    tensors: dict[str, Tensor] = {}
    for name in TENSORS:
        if bound.get(name) is not None:
            tensor = value(bound[name])
            if tensor is None:
                return None
            tensors[name] = tensor.detach()
    module = None if value(bound["input"]) is not None else _make(function, bound, tensors, len(call.shapes[0] or ()))
    if module is None:
        return None
    for name, tensor in tensors.items():
        setattr(module, name, tensor if name.startswith("running") else nn.Parameter(tensor, requires_grad=False))
    return module.eval(), bound


def _make(function: str, bound: Mapping[str, Any], tensors: Mapping[str, Tensor], rank: int) -> nn.Module | None:
    """A layer of that form, its weights still to be set."""
    weight, has_bias = tensors.get("weight"), bound["bias"] is not None
    norm: nn.Module
    with torch.device("meta"):
        if function == "linear":
            return None if weight is None or weight.ndim != 2 else nn.Linear(weight.shape[1], len(weight), has_bias)
        if function.startswith("conv"):
            if weight is None or rank != weight.ndim:
                return None
            layer: Any = nn.Conv1d if function == "conv1d" else nn.Conv2d
            options = {name: bound[name] for name in ("stride", "padding", "dilation", "groups")}
            inputs, kernel = weight.shape[1] * bound["groups"], tuple(weight.shape[2:])
            return layer(inputs, len(weight), kernel, bias=has_bias, **options)
        if function == "batch_norm":
            mean = tensors.get("running_mean")
            if bound["training"] or mean is None or rank > 4:
                return None
            norm = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(len(mean), bound["eps"])
            norm.affine = weight is not None
            norm.num_batches_tracked = None
        elif function == "layer_norm":
            norm = nn.LayerNorm(tuple(bound["normalized_shape"]), bound["eps"])
        elif weight is None:
            return None
        elif function == "group_norm":
            norm = GroupNorm(bound["num_groups"], len(weight), bound["eps"])
        else:
            if not bound.get("use_input_stats", True) or rank not in (3, 4):
                return None
            norm = (nn.InstanceNorm2d if rank == 4 else nn.InstanceNorm1d)(len(weight), bound["eps"], affine=True)
    for name in ("weight", "bias"):
        if bound[name] is None:
            norm.register_parameter(name, None)
    return norm
