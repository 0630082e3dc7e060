"""Calls of functions with weights as plain layers: the one form in which all that follows meets them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recording import Call

#: Arguments of the functions that become layers.
_ARGUMENTS = {
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}
#: The same of functions that take them in another order.
_ORDERS: dict[Any, tuple[str, ...]] = {
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    torch.instance_norm: (
        "input",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "use_input_stats",
        "momentum",
        "eps",
    ),
}
_DEFAULTS = {
    "bias": None,
    "weight": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "training": False,
    "eps": 1e-5,
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


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
        name: what to call it: the name of the module that has the weight, as a rule.
        weight: the parameters whose rows are those of the layer's weight, each with the first row that it makes; one as a rule.
            None where zeros in rows of parameters are none in rows of the weight.
        bias: likewise, empty where there is none.
        tensors: all parameters and buffers that its weight, bias and statistics are, or are computed from.
        is_plain: whether the network has a module of that name in the graph with that very weight.
    """

    name: str
    weight: tuple[tuple[str, int], ...] | None
    bias: tuple[tuple[str, int], ...] | None
    tensors: tuple[str, ...] = ()
    is_plain: bool = False

    @property
    def writable(self) -> bool:
        """Whether zeros in rows of parameters make outputs of the layer zero and leave the others."""
        return bool(self.weight) and self.bias is not None


def lower(call: Call, value: Callable[[Any], Tensor | None]) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """The layer that a call is, and its arguments by name; None where it is none.

    Args:
        call: of a function.
        value: the tensor that an argument is in every pass, None where there is no such.
    """
    kind = getattr(call.target, "__name__", "")
    if call.op != "call_function" or kind not in _ARGUMENTS:
        return None
    bound = {
        **_DEFAULTS,
        **dict(zip(_ORDERS.get(call.target, _ARGUMENTS[kind]), call.args, strict=False)),
        **call.kwargs,
    }
    tensors = {name: value(bound[name]) for name in _TENSORS if bound.get(name) is not None}
    if any(tensor is None for tensor in tensors.values()) or value(bound["input"]) is not None:
        return None
    module = _make(kind, bound, tensors, len(call.shapes[0] or ()))
    if module is None:
        return None
    for name, tensor in tensors.items():
        assert tensor is not None
        kept = tensor.detach()
        setattr(module, name, kept if name.startswith("running") else nn.Parameter(kept, requires_grad=False))
    return module.eval(), bound


def _make(kind: str, bound: Mapping[str, Any], tensors: Mapping[str, Tensor | None], rank: int) -> nn.Module | None:
    """A layer of that form, its weights still to be set."""
    weight, has_bias = tensors.get("weight"), bound["bias"] is not None
    with torch.device("meta"):
        if kind == "linear":
            return None if weight is None or weight.ndim != 2 else nn.Linear(weight.shape[1], len(weight), has_bias)
        if kind.startswith("conv"):
            layer: Any = nn.Conv1d if kind == "conv1d" else nn.Conv2d
            if weight is None or rank != weight.ndim:
                return None
            options = {name: bound[name] for name in ("stride", "padding", "dilation", "groups")}
            return layer(
                weight.shape[1] * bound["groups"], len(weight), tuple(weight.shape[2:]), bias=has_bias, **options
            )
        if kind == "batch_norm":
            mean = tensors.get("running_mean")
            if bound["training"] or mean is None or rank > 4:
                return None
            norm: nn.Module = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(len(mean), bound["eps"])
        elif kind == "layer_norm":
            norm = nn.LayerNorm(tuple(bound["normalized_shape"]), bound["eps"])
        elif weight is None:
            return None
        elif kind == "group_norm":
            norm = GroupNorm(bound["num_groups"], len(weight), bound["eps"])
        else:
            if not bound.get("use_input_stats", True) or rank not in (3, 4):
                return None
            norm = (nn.InstanceNorm2d if rank == 4 else nn.InstanceNorm1d)(len(weight), bound["eps"], affine=True)
    for name in ("weight", "bias"):
        if bound[name] is None:
            norm.register_parameter(name, None)
    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        norm.affine = weight is not None
        norm.num_batches_tracked = None
    return norm
