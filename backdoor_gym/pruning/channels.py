"""How channels pass through the operations of a traced network: what each node of the graph does to them.

Each value has a *layout*: which of its axes are channels, and how many. It follows from the operations alone, without any
image: images are (n, C, H, W), a convolution gives its channels in axis 1, a linear layer in the last one, and moving,
flattening or pooling axes is followed. What mixes channels (attention, say) gives a value of unknown layout.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..errors import UntraceableError
from ..zoo.preprocessing import Preprocess
from .tracing import is_number

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
#: Normalisations by statistics of the very values that they normalise.
LIVE_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
#: Layers that mix channels by weights of their own, in which no neuron is looked for.
OPAQUE = (nn.MultiheadAttention, nn.Embedding)

# Each output channel depends on the same input channel alone, and a channel of zeros stays zero.
_ZERO_PRESERVING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.ELU, nn.SELU,
    nn.CELU, nn.Tanh, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout,
)  # fmt: skip
_ZERO_PRESERVING_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.prelu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, F.elu, F.selu, F.celu, F.tanh,
    F.softsign, F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, torch.relu, torch.tanh, torch.abs, torch.neg,
    torch.square, operator.neg,
}  # fmt: skip
_ZERO_PRESERVING_METHODS = {
    "relu", "tanh", "abs", "neg", "square", "contiguous", "float", "to", "type_as", "clone", "detach",
}  # fmt: skip
# The same, for values (n, C, H, W) or (n, C, L), over their positions alone.
_SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d, nn.Upsample,
)  # fmt: skip
_SPATIAL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.lp_pool2d, F.interpolate, torch.max_pool2d,
}  # fmt: skip
# Each channel on its own, but zero may become something else: gates, between 0 and 1, and others.
_GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid)
_GATE_FUNCTIONS = {F.sigmoid, F.hardsigmoid, torch.sigmoid}
_OTHER_MODULES = (nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.LogSigmoid, nn.ConstantPad2d)
_OTHER_FUNCTIONS = {
    F.softplus, F.softmax, F.log_softmax, F.logsigmoid, torch.softmax, torch.log_softmax, torch.exp, torch.clamp,
    torch.pow, operator.pow,
}  # fmt: skip
_OTHER_METHODS = {"softmax", "log_softmax", "exp", "clamp", "pow"}
_SUMS = {operator.add, operator.iadd, torch.add, operator.sub, torch.sub, "add", "sub"}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
_QUOTIENTS = {operator.truediv, torch.div, torch.true_divide, "div"}
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_REDUCTIONS = {"mean", "sum", "amax", torch.mean, torch.sum, torch.amax}
#: Products of two activations, as attention forms them.
ATTENTION = {
    operator.matmul, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, F.scaled_dot_product_attention, "matmul", "bmm",
}  # fmt: skip
_RESHAPING = {"view", "reshape", torch.reshape}
#: Methods that ask their argument for its shape or type alone.
_LIKE_ANOTHER = {"expand_as", "type_as"}
_MIXING_BY_WEIGHTS = ATTENTION | {F.linear, F.conv1d, F.conv2d, F.bilinear}


class Kind(Enum):
    """What a node does to channels."""

    IMAGES = auto()  # what the network is called with
    CONSTANT = auto()  # parameters, buffers, shapes, masks, and what is computed from these alone
    WEIGHTED = auto()  # a convolution or a linear layer: new channels
    NORM = auto()  # batch normalisation: each channel on its own, zero does not stay zero
    LIVE_NORM = auto()  # another normalisation: a channel of its own weight, by statistics that all may share
    MASK = auto()  # the mask of a neuron layer
    ZERO_PRESERVING = auto()  # each channel on its own, zero stays zero
    CHANNELWISE = auto()  # each channel on its own, zero may change
    GATE = auto()  # the same, into (0, 1)
    SUM = auto()  # several tensors added, channel by channel
    PRODUCT = auto()  # several tensors multiplied, channel by channel
    CONCATENATION = auto()  # channels of several tensors side by side
    OPAQUE = auto()  # mixes channels by weights in which no neurons are
    MIXING = auto()  # mixes channels without weights, or in a way that is not known


#: What leaves each channel in its place.
CHANNELWISE = frozenset(
    {Kind.NORM, Kind.LIVE_NORM, Kind.MASK, Kind.ZERO_PRESERVING, Kind.CHANNELWISE, Kind.GATE, Kind.SUM, Kind.PRODUCT}
)


@dataclass(frozen=True)
class Layout:
    """Where the channels of a value are.

    Attributes:
        rank: number of axes, None where not known.
        axis: of the channels; -1 for the last one where the rank is not known.
        size: number of channels, None where not known.
        flat: whether each channel is a block of consecutive entries of that axis, as after flattening (C, H, W).
    """

    rank: int | None
    axis: int
    size: int | None
    flat: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the channels are in the last axis."""
        return self.axis == -1 or (self.rank is not None and self.axis == self.rank - 1)


def mask_channels(values: Tensor, mask: Tensor | None, axis: int = 1) -> Tensor:
    """The values times the mask (C,) of zeros and ones along their channels' axis, 1 or -1; None leaves everything."""
    if mask is None:
        return values
    return values * (mask if axis == -1 else mask.view(-1, *[1] * (values.ndim - 2)))


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that the node calls, if it calls one."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


class Channels:
    """What each node of a traced network does to channels, and where the channels of its value are.

    Attributes:
        kinds: of each node.
        layouts: of each node's value, None where not known.

    Raises:
        UntraceableError: a layer has weights and is of a type that is not known.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.kinds: dict[fx.Node, Kind] = {}
        self.layouts: dict[fx.Node, Layout | None] = {}
        self._image_channels = self._find_image_channels()
        for node in self.nodes:
            kind, self.layouts[node] = self._kind(node)
            if kind is Kind.ZERO_PRESERVING and self.kinds[node.all_input_nodes[0]] is Kind.GATE:
                kind = Kind.GATE  # moved elsewhere
            self.kinds[node] = kind

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values the node reads, without constants and what is only asked for its shape."""
        read = node.all_input_nodes[:1] if node.target in _LIKE_ANOTHER else node.all_input_nodes
        return [source for source in read if self.kinds[source] is not Kind.CONSTANT]

    def carriers(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that the node's channels come from: of a product with gates what is gated."""
        inputs = self.inputs(node)
        if self.kinds[node] is Kind.PRODUCT:
            return [source for source in inputs if self.kinds[source] is not Kind.GATE] or inputs
        return inputs

    def pieces(self, node: fx.Node) -> list[tuple[fx.Node, int | None]]:
        """The inputs of a concatenation, with the channel at which each begins (None where not known)."""
        if node.target is F.pad:
            layout = self.layouts[self.inputs(node)[0]]
            assert layout is not None
            assert layout.rank is not None
            return [(self.inputs(node)[0], _argument(node, 1, "pad")[2 * (layout.rank - 1 - layout.axis)])]
        start: int | None = 0
        pieces = []
        for source in _concatenated(node):
            if self.kinds[source] is not Kind.CONSTANT:
                pieces.append((source, start))
            layout = self.layouts[source]
            start = None if start is None or layout is None or layout.size is None else start + layout.size
        return pieces

    def _find_image_channels(self) -> int | None:
        for node in self.nodes:
            module = module_of(self.graph_module, node)
            if isinstance(module, nn.Conv2d) and self._is_image(node.all_input_nodes[0]):
                return module.in_channels
        return None

    def _is_image(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or isinstance(module_of(self.graph_module, node), Preprocess)

    def _kind(self, node: fx.Node) -> tuple[Kind, Layout | None]:
        if node.op == "placeholder":
            first = next(other for other in self.nodes if other.op == "placeholder" and other.users)
            if node is first:
                return Kind.IMAGES, Layout(4, 1, self._image_channels)
            return Kind.CONSTANT, None
        inputs = self.inputs(node)
        if node.op == "output":
            return Kind.MIXING, None
        if node.op == "get_attr" or is_number(node) or not inputs:
            return Kind.CONSTANT, None
        layout = self.layouts[inputs[0]]
        module = module_of(self.graph_module, node)
        if module is not None:
            return self._module_kind(str(node.target), module, layout)
        return self._function_kind(node, inputs, layout)

    def _module_kind(self, name: str, module: nn.Module, layout: Layout | None) -> tuple[Kind, Layout | None]:
        spatial = layout is not None and layout.axis == 1 and not layout.flat
        if isinstance(module, Preprocess):
            return Kind.IMAGES, layout
        if isinstance(module, nn.Linear):
            rank = None if layout is None else layout.rank
            return Kind.WEIGHTED, Layout(rank, -1 if rank is None else rank - 1, module.out_features)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return Kind.WEIGHTED, Layout(2 + len(module.kernel_size), 1, module.out_channels)
        if isinstance(module, NORMS):
            rank = None if layout is None else layout.rank
            return Kind.NORM, Layout(rank, 1, module.num_features, layout is not None and layout.flat)
        if isinstance(module, nn.LayerNorm):
            first = type(module) is not nn.LayerNorm  # one of its own, which may normalise channels that come first
            if len(module.normalized_shape) == 1 and layout is not None and (layout.is_last or first):
                return Kind.LIVE_NORM, layout
            return Kind.MIXING, layout
        if isinstance(module, LIVE_NORMS):
            return (Kind.LIVE_NORM, layout) if spatial else (Kind.MIXING, layout)
        if isinstance(module, _ZERO_PRESERVING_MODULES):
            return Kind.ZERO_PRESERVING, layout
        if isinstance(module, _SPATIAL_MODULES):
            return (Kind.ZERO_PRESERVING, layout) if spatial else (Kind.MIXING, None)
        if isinstance(module, nn.Flatten):
            return _moved(_flatten(layout, module.start_dim, module.end_dim))
        if isinstance(module, _GATE_MODULES):
            return Kind.GATE, layout
        if isinstance(module, _OTHER_MODULES):
            return Kind.CHANNELWISE, layout
        if next(module.parameters(), None) is not None and not isinstance(module, OPAQUE):
            raise UntraceableError(
                f"layer {name} is of a type whose weights are not understood ({type(module).__name__}): known are "
                "convolutions, linear layers, batch, layer, group and instance normalisation and multi-head attention; "
                "express this layer by them"
            )
        return (Kind.OPAQUE if isinstance(module, OPAQUE) else Kind.MIXING), None

    def _function_kind(self, node: fx.Node, inputs: list[fx.Node], layout: Layout | None) -> tuple[Kind, Layout | None]:
        target: Any = node.target
        mixing = Kind.OPAQUE if target in _MIXING_BY_WEIGHTS and len(inputs) < len(_tensors(node)) else Kind.MIXING
        if target is mask_channels:
            return Kind.MASK, layout
        if target in _ZERO_PRESERVING_FUNCTIONS or (node.op == "call_method" and target in _ZERO_PRESERVING_METHODS):
            return Kind.ZERO_PRESERVING, layout
        if target in _SPATIAL_FUNCTIONS:
            spatial = layout is not None and layout.axis == 1 and not layout.flat
            return (Kind.ZERO_PRESERVING, layout) if spatial else (Kind.MIXING, None)
        if target in _GATE_FUNCTIONS or (node.op == "call_method" and target in ("sigmoid", "hardsigmoid")):
            return Kind.GATE, layout
        if target in _OTHER_FUNCTIONS or (node.op == "call_method" and target in _OTHER_METHODS):
            return Kind.CHANNELWISE, layout
        if target in _SUMS or target in _PRODUCTS or target in _QUOTIENTS:
            return self._arithmetic_kind(node, inputs)
        if target in _CONCATENATIONS:
            return self._concatenation_kind(node, inputs)
        if target is F.pad:
            return _padded(layout, node)
        found = None
        if layout is not None and target in _RESHAPING:
            found = self._reshaped(layout, node)
        elif layout is not None and target in _MOVES:
            found = _MOVES[target](layout, node)
        return (mixing, None) if found is None else (Kind.ZERO_PRESERVING, found)

    def _reshaped(self, layout: Layout, node: fx.Node) -> Layout | None:
        arguments = node.args[1:]
        shape: Sequence[Any] = arguments
        if len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            shape = arguments[0]
        if len(shape) == 2 and layout.axis == 1 and layout.rank != 2:
            return _flatten(layout, 1, -1)  # (n, everything): there is no other way to keep the images apart
        if len(shape) == 2 and layout.rank == 2:
            return layout
        if layout.flat or len(shape) < 2:
            return None
        sizes = [self._size(entry) for entry in shape]
        if layout.axis == 1 and (sizes[1] == layout.size is not None or (sizes[1] == -1 and set(sizes[2:]) == {1})):
            return Layout(len(shape), 1, layout.size)
        if layout.is_last and sizes[-1] == layout.size is not None:
            return Layout(len(shape), len(shape) - 1, layout.size)
        return None

    def _size(self, entry: Any) -> int | None:
        """An entry of a shape: a number, or the number of channels of another value."""
        if not isinstance(entry, fx.Node):
            return entry
        value, axis = entry.args[0], entry.args[1] if len(entry.args) > 1 else None
        if entry.target is operator.getitem and isinstance(value, fx.Node) and is_number(value):
            value = value.args[0]
        layout = self.layouts.get(value) if isinstance(value, fx.Node) else None
        if layout is None or layout.rank is None or not isinstance(axis, int) or axis % layout.rank != layout.axis:
            return None
        return layout.size

    def _arithmetic_kind(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[Kind, Layout | None]:
        target: Any = node.target
        layouts = list(dict.fromkeys(self.layouts[source] for source in inputs if self.layouts[source] is not None))
        alike = {None if layout is None else replace(layout, size=None) for layout in layouts}
        if len(alike) > 1:
            return Kind.MIXING, None
        layout = next(
            (one for one in layouts if one is not None and one.size is not None), layouts[0] if layouts else None
        )
        if len(inputs) == 1:
            scales = target in _PRODUCTS or (target in _QUOTIENTS and node.args[0] is inputs[0])
            return (Kind.ZERO_PRESERVING if scales else Kind.CHANNELWISE), layout
        if target in _SUMS:
            return Kind.SUM, layout
        return (Kind.PRODUCT, layout) if target in _PRODUCTS else (Kind.MIXING, None)

    def _concatenation_kind(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[Kind, Layout | None]:
        layouts = [self.layouts[source] for source in _concatenated(node)]
        known = [layout for layout in layouts if layout is not None]
        axis = _argument(node, 1, "dim", 0)
        if not known or not isinstance(axis, int) or len({replace(layout, size=None) for layout in known}) > 1:
            return Kind.MIXING, None
        first = known[0]
        if first.rank is None:
            return Kind.MIXING, None
        if axis % first.rank != first.axis:  # the same channels, of more positions
            size = next((layout.size for layout in known if layout.size is not None), None)
            return (Kind.SUM, replace(first, size=size)) if len(inputs) > 1 else (Kind.CHANNELWISE, first)
        if first.flat:
            return Kind.MIXING, None
        sizes = [None if layout is None else layout.size for layout in layouts]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        return Kind.CONCATENATION, replace(first, size=total)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if not is_number(source)]


def _concatenated(node: fx.Node) -> list[fx.Node]:
    """What is concatenated, in order and as often as it is; padded channels are a concatenation with zeros."""
    parts = _argument(node, 0, "tensors", ())
    if isinstance(parts, fx.Node):
        return [parts]
    return [part for part in parts if isinstance(part, fx.Node)]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _axes(node: fx.Node, name: str = "dim") -> list[int] | None:
    """Axes given one by one or as one list; None where they are not plain numbers."""
    found = list(node.args[1:]) if len(node.args) > 1 else [node.kwargs.get(name, node.kwargs.get("dims"))]
    if len(found) == 1 and isinstance(found[0], list | tuple):
        found = list(found[0])
    axes = [axis for axis in found if isinstance(axis, int)]
    return axes if len(axes) == len(found) else None


def _moved(layout: Layout | None) -> tuple[Kind, Layout | None]:
    return (Kind.MIXING, None) if layout is None else (Kind.ZERO_PRESERVING, layout)


def _flatten(layout: Layout | None, start: int, end: int) -> Layout | None:
    if layout is None or layout.rank is None or layout.flat:
        return layout if layout is not None and layout.rank == 2 and start == 1 else None
    start, end = start % layout.rank, end % layout.rank
    rank = layout.rank - (end - start)
    if end < layout.axis:
        return replace(layout, rank=rank, axis=layout.axis - (end - start))
    if start > layout.axis:
        return replace(layout, rank=rank)
    if start == layout.axis:
        return replace(layout, rank=rank, flat=end > start)
    return None


def _flattened(layout: Layout, node: fx.Node) -> Layout | None:
    start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
    return _flatten(layout, start, end) if isinstance(start, int) and isinstance(end, int) else None


def _permuted(layout: Layout, node: fx.Node) -> Layout | None:
    order = _axes(node, "dims")
    if layout.rank is None or order is None or len(order) != layout.rank:
        return None
    return replace(layout, axis=[axis % layout.rank for axis in order].index(layout.axis))


def _transposed(layout: Layout, node: fx.Node) -> Layout | None:
    pair = _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
    if layout.rank is None or not all(isinstance(axis, int) for axis in pair):
        return None
    first, second = (axis % layout.rank for axis in pair)
    return replace(layout, axis={first: second, second: first}.get(layout.axis, layout.axis))


def _reduced(layout: Layout, node: fx.Node) -> Layout | None:
    """Means, sums or maxima over axes that are no channels, of which there must be one at least."""
    axes = _argument(node, 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if layout.rank is None or not isinstance(axes, list | tuple) or not axes:
        return None
    gone = {axis % layout.rank for axis in axes}
    if layout.axis in gone or 0 in gone:
        return None
    if _argument(node, 2, "keepdim", False):
        return layout
    return replace(layout, rank=layout.rank - len(gone), axis=layout.axis - sum(axis < layout.axis for axis in gone))


def _squeezed(layout: Layout, node: fx.Node) -> Layout | None:
    return _reduced(layout, node) if len(node.args) > 1 or node.kwargs else None


def _unsqueezed(layout: Layout, node: fx.Node) -> Layout | None:
    axis = _argument(node, 1, "dim")
    if layout.rank is None or not isinstance(axis, int):
        return None
    axis = axis % (layout.rank + 1)
    return replace(layout, rank=layout.rank + 1, axis=layout.axis + (axis <= layout.axis))


def _indexed(layout: Layout, node: fx.Node) -> Layout | None:
    """``x[:, 0]``, ``x[:, :, ::2]`` and the like; all channels must be left."""
    index = node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if layout.rank is None or len(index) > layout.rank:
        return None
    rank, axis = layout.rank, layout.axis
    for position, one in enumerate(index):
        if isinstance(one, slice):
            if position == layout.axis and one != slice(None):
                return None
        elif isinstance(one, int) and position not in (0, layout.axis):
            rank, axis = rank - 1, axis - (position < layout.axis)
        else:
            return None
    return replace(layout, rank=rank, axis=axis)


def _expanded(layout: Layout, node: fx.Node) -> Layout | None:
    return layout if layout.rank is not None and len(_axes(node, "sizes") or node.args[1:]) == layout.rank else None


def _padded(layout: Layout | None, node: fx.Node) -> tuple[Kind, Layout | None]:
    """Padding of positions, or of channels by zeros, which is a concatenation with nothing."""
    padding = _argument(node, 1, "pad")
    mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value")
    plain = isinstance(padding, list | tuple) and all(isinstance(one, int) for one in padding)
    if layout is None or layout.rank is None or not plain:
        return Kind.MIXING, None
    zeros = mode == "constant" and not value
    behind = 2 * (layout.rank - 1 - layout.axis)
    if len(padding) <= behind or not any(padding[behind : behind + 2]):
        return (Kind.ZERO_PRESERVING if zeros or mode != "constant" else Kind.CHANNELWISE), layout
    front, back = padding[behind : behind + 2]
    if not zeros or len(padding) > behind + 2 or front < 0 or back < 0 or layout.flat or layout.size is None:
        return Kind.MIXING, None
    return Kind.CONCATENATION, replace(layout, size=front + layout.size + back)


_MOVES: dict[Any, Callable[[Layout, fx.Node], Layout | None]] = {
    "flatten": _flattened, torch.flatten: _flattened, "expand": _expanded, "expand_as": lambda layout, _: layout,
    "permute": _permuted, torch.permute: _permuted, "transpose": _transposed, torch.transpose: _transposed,
    "swapaxes": _transposed, "squeeze": _squeezed, torch.squeeze: _squeezed, "unsqueeze": _unsqueezed,
    torch.unsqueeze: _unsqueezed, operator.getitem: _indexed, **dict.fromkeys(_REDUCTIONS, _reduced),
}  # fmt: skip
