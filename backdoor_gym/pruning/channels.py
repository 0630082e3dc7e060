"""How channels pass through the operations of a traced network: what each node of the graph does to them."""

import operator
from collections.abc import Iterator
from enum import Enum, auto

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..errors import UntraceableError

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# Each output channel depends on the same input channel alone, and a channel of zeros stays zero.
_ZERO_PRESERVING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.Identity, nn.Flatten,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
)  # fmt: skip
_ZERO_PRESERVING_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.hardswish, F.elu, F.tanh, torch.relu, torch.tanh, torch.flatten,
    F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean,
}  # fmt: skip
_ZERO_PRESERVING_METHODS = {
    "relu",
    "tanh",
    "flatten",
    "view",
    "reshape",
    "mean",
    "contiguous",
    "squeeze",
    "float",
    "clone",
}
# The same, but zero may become something else.
_OTHER_MODULES = (nn.Sigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.Hardsigmoid)
_OTHER_FUNCTIONS = {F.sigmoid, torch.sigmoid, F.softplus, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax}
_OTHER_METHODS = {"sigmoid", "softmax", "log_softmax"}
# Sums keep channels apart too; with a constant operand the others do.
_SUMS = {operator.add, operator.iadd, torch.add, "add"}
_ARITHMETIC = _SUMS | {
    operator.sub,
    operator.mul,
    operator.truediv,
    torch.sub,
    torch.mul,
    torch.div,
    "sub",
    "mul",
    "div",
}


# Of those, what keeps channels apart only with the right arguments: (n, C, H, W) to (n, C * H * W), or means over pixels.
_RESHAPING = {"view", "reshape"}
_FLATTENING = {"flatten", torch.flatten}
_REDUCING = {"mean", torch.mean, "squeeze"}


class Kind(Enum):
    """What a node does to channels."""

    INPUT = auto()  # the images, or a constant
    WEIGHTED = auto()  # a convolution or a linear layer: new channels
    NORM = auto()  # batch normalisation: each channel on its own, zero does not stay zero
    MASK = auto()  # the mask of a neuron layer
    ZERO_PRESERVING = auto()  # each channel on its own, zero stays zero
    CHANNELWISE = auto()  # each channel on its own, zero may change
    SUM = auto()  # several tensors added, channel by channel
    OPAQUE = auto()  # anything else


def mask_channels(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values (n, C, ...) times the mask (C,) of zeros and ones; None leaves everything."""
    return values if mask is None else values * mask.view(-1, *[1] * (values.ndim - 2))


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that the node calls, if it calls one."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values the node reads, without constants and shapes."""
    return [source for source in node.all_input_nodes if source.op != "get_attr" and not _is_number(source)]


def kind_of(graph_module: fx.GraphModule, node: fx.Node) -> Kind:
    """What the node does to channels."""
    if node.op in ("placeholder", "get_attr"):
        return Kind.INPUT
    module = module_of(graph_module, node)
    if module is not None:
        for types, kind in (
            (WEIGHTED, Kind.WEIGHTED),
            (NORMS, Kind.NORM),
            (_ZERO_PRESERVING_MODULES, Kind.ZERO_PRESERVING),
            (_OTHER_MODULES, Kind.CHANNELWISE),
        ):
            if isinstance(module, types):
                return kind
        return Kind.OPAQUE
    target = node.target
    if target is mask_channels:
        return Kind.MASK
    if not _keeps_channels(node):
        return Kind.OPAQUE
    if target in _ZERO_PRESERVING_FUNCTIONS or (node.op == "call_method" and target in _ZERO_PRESERVING_METHODS):
        return Kind.ZERO_PRESERVING
    if target in _OTHER_FUNCTIONS or (node.op == "call_method" and target in _OTHER_METHODS):
        return Kind.CHANNELWISE
    if target in _ARITHMETIC:
        if len(tensor_inputs(node)) == 1:
            return Kind.CHANNELWISE
        if target in _SUMS:
            return Kind.SUM
    return Kind.OPAQUE


def sources(
    graph_module: fx.GraphModule, start: fx.Node, stop: set[fx.Node]
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Walk back from a value to where its channels come from.

    Args:
        graph_module: the traced network.
        start: the node whose value is asked about.
        stop: nodes to yield and not to pass, beside weighted layers.

    Yields:
        Each weighted or ``stop`` node reached, nearest first, with the batch normalisations passed on the way.

    Raises:
        UntraceableError: an operation on the way does not keep channels apart.
    """
    front: list[tuple[fx.Node, list[fx.Node]]] = [(start, [])]
    seen = set()
    while front:
        node, norms = front.pop(0)
        if node in seen:
            continue
        seen.add(node)
        kind = kind_of(graph_module, node)
        if node in stop or kind is Kind.WEIGHTED:
            yield node, norms
        elif kind is Kind.OPAQUE:
            raise UntraceableError(_refusal(graph_module, node))
        elif kind is not Kind.INPUT:
            passed = [*norms, node] if kind is Kind.NORM else norms
            front.extend(
                (source, passed) for source in tensor_inputs(node) if not source.name.startswith("neuron_mask")
            )


def _keeps_channels(node: fx.Node) -> bool:
    """Whether the arguments of a reshaping or reducing operation leave each channel in its place."""
    arguments = node.args[1:]
    if node.target in _RESHAPING:
        shape = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
        return len(shape) == 2
    if node.target in _FLATTENING:
        return (arguments or (node.kwargs.get("start_dim", 0),)) == (1,)
    if node.target in _REDUCING:
        axes = arguments[0] if arguments else node.kwargs.get("dim")
        pixels = {2, 3, -1, -2}
        return set(axes) <= pixels if isinstance(axes, tuple | list) else axes in pixels
    return True


def _is_number(node: fx.Node) -> bool:
    """Whether the node computes a shape rather than values (``x.size(0)``, ``x.shape``)."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    return node.op == "call_function" and node.target is operator.getitem and _is_number(node.all_input_nodes[0])


def _refusal(graph_module: fx.GraphModule, node: fx.Node) -> str:
    module = module_of(graph_module, node)
    what = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    where = str(node.target) if module is not None else _enclosing(node)
    return (
        f"cannot follow the channels through {what} in {where}: known are convolutions, linear layers, batch "
        "normalisation, activations, pooling, flattening and sums; express this layer by them"
    )


def _enclosing(node: fx.Node) -> str:
    """Name of the module in whose forward the operation stands."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name in stack if name]
    return f"layer {names[-1]}" if names else f"the network's own forward (node {node.name})"
