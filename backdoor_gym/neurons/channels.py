"""How channels pass through the operations of a traced network: what each node does to them, and where they are in its value.

Every channel that a layer gives has a *label*, a number of its own. A value's labels say of each of its entries which channel
it is of. What only moves entries (reshaping, slicing, concatenating, ...) is followed by doing it to the labels; what works on
each channel alone keeps them; a sum of two channels is a new label with both as parents. So where channels go is computed,
whatever way the code is written in. What mixes channels (attention's weights, say) gives a value without labels.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..networks.preprocessing import Preprocess
from .tracing import is_number

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

#: Labels of an entry that is zero whatever the image, and of one of which no channel is known.
ZERO, UNKNOWN = 0, -1

# Each entry by itself, and zero stays zero.
_ZERO_PRESERVING = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "hardswish", "hardtanh", "elu", "selu", "celu",
    "tanh", "softsign", "softshrink", "hardshrink", "tanhshrink", "dropout", "dropout1d", "dropout2d", "alpha_dropout", "abs",
    "neg", "square", "sqrt", "sign", "sin", "erf", "clone", "contiguous", "detach", "to", "float", "double", "half", "type_as",
    "round", "floor", "ceil", "nan_to_num",
})  # fmt: skip
_GATES = frozenset({"sigmoid", "hardsigmoid"})
_OTHER = frozenset({
    "softplus", "logsigmoid", "exp", "clamp", "clip", "clamp_min", "clamp_max", "pow", "log", "rsqrt", "reciprocal", "cos",
    "masked_fill", "threshold",
})  # fmt: skip
# Entries are moved, left out or repeated.
_MOVES = frozenset({
    "reshape", "view", "reshape_as", "view_as", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis",
    "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "roll", "flip",
    "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem", "select", "narrow", "index_select", "cat",
    "concat", "concatenate", "stack", "hstack", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "getattr",
    "broadcast_to", "broadcast_tensors", "ravel", "meshgrid",
})  # fmt: skip
# Positions of a map are mixed, channels are not.
_SPATIAL = frozenset({
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "lp_pool2d", "interpolate", "upsample", "grid_sample",
})  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "std", "var", "norm"})
_SOFTMAX = frozenset({"softmax", "log_softmax"})
_SUMS = frozenset({"add", "sub", "maximum", "minimum"})
_QUOTIENTS = frozenset({"truediv", "div", "true_divide"})
#: Products of two activations, as attention forms them.
PRODUCTS_OF_MATRICES = frozenset({
    "matmul", "mm", "bmm", "baddbmm", "einsum", "tensordot", "scaled_dot_product_attention",
})  # fmt: skip
_LIVE = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"})
#: Methods that ask their argument for its shape or type alone.
_LIKE_ANOTHER = frozenset({"expand_as", "type_as", "reshape_as", "view_as"})
#: Operations with weights in which no neuron is looked for.
OPAQUE = frozenset({
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv1d", "conv2d", "conv3d", "linear", "bilinear", "embedding",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "addmm", "addbmm",
    "multi_head_attention_forward", "convolution", "cdist",
})  # fmt: skip


class Kind(Enum):
    """What a node does to channels."""

    IMAGES = auto()  # what the network is called with
    CONSTANT = auto()  # parameters, buffers, masks, and what is computed from these alone
    WEIGHTED = auto()  # a convolution or a linear layer: new channels
    NORM = auto()  # batch normalisation: each channel on its own, zero does not stay zero
    LIVE_NORM = auto()  # another normalisation: a channel of its own weight, by statistics that all may share
    MASK = auto()  # the mask of a neuron layer
    ZERO_PRESERVING = auto()  # each channel on its own, zero stays zero; or moved elsewhere
    CHANNELWISE = auto()  # each channel on its own, zero may change
    GATE = auto()  # the same, into (0, 1)
    SUM = auto()  # several tensors added, channel by channel
    PRODUCT = auto()  # several tensors multiplied, channel by channel
    OPAQUE = auto()  # mixes channels by weights in which no neurons are
    MIXING = auto()  # mixes channels without weights, or in a way that is not known


def mask_channels(values: Tensor, mask: Tensor | None, axis: int = 1, unit_of: Tensor | None = None) -> Tensor:
    """The values times the mask of zeros and ones along their channels' axis, 1 or -1; None leaves everything.

    Args:
        values: of any shape.
        mask: of each channel, or of each unit where ``unit_of`` says which one each channel is of (-1 for none).
        axis: of the channels.
        unit_of: int64 (channels,).
    """
    if mask is None:
        return values
    if unit_of is not None:
        mask = torch.where(unit_of >= 0, mask[unit_of], torch.ones((), dtype=mask.dtype, device=mask.device))
    return values * (mask if axis == -1 else mask.view(-1, *[1] * (values.ndim - 2)))


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that the node calls, if it calls one."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def operation(node: fx.Node) -> str:
    """What the node does, by the name that functions and methods of PyTorch share."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a value.

    Attributes:
        thin: float64 (exact numbers, and the one dtype that every movement takes), with one entry along each axis on which they
            do not change.
        shape: of the value.
    """

    thin: Tensor
    shape: torch.Size

    @property
    def full(self) -> Tensor:
        """Of each entry."""
        return self.thin.expand(self.shape)

    def along(self, axis: int) -> np.ndarray:
        """Of each place along one axis, int64; unknown where they change elsewhere."""
        axis %= len(self.shape)
        if all(size == 1 for other, size in enumerate(self.thin.shape) if other != axis):
            return self.thin.flatten().expand(self.shape[axis]).long().numpy()
        return np.full(self.shape[axis], UNKNOWN)

    def steady(self, axes: Sequence[int]) -> bool:
        """Whether they do not change along these axes."""
        return all(self.thin.shape[axis % len(self.shape)] == 1 for axis in axes)


@dataclass(frozen=True, eq=False)
class Block:
    """Labels that one node made.

    Attributes:
        node: of the graph.
        start: the first label.
        size: how many.
        parents: for each thing that it read, the label that each one comes from, int64 (size,).
        carriers: those of the parents that the channels come from: of a product with gates what is gated.
    """

    node: fx.Node
    start: int
    size: int
    parents: tuple[np.ndarray, ...] = ()
    carriers: tuple[np.ndarray, ...] = ()


class Channels:
    """What each node of a traced network does to channels, and where the channels of its value are.

    Attributes:
        kinds: of each node.
        labels: of each node's value, None where no channel is known in it.
        blocks: all labels, in the order in which they were made.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.kinds: dict[fx.Node, Kind] = {}
        self.labels: dict[fx.Node, Labels | None] = {}
        self.blocks: list[Block] = []
        self._pieces: dict[fx.Node, Any] = {}
        self._next = 1
        for node in self.nodes:
            self.kinds[node], self.labels[node] = self._kind(node)
        self._starts = np.array([block.start for block in self.blocks])

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values the node reads, without constants and what is only asked for its shape."""
        read = node.all_input_nodes[:1] if operation(node) in _LIKE_ANOTHER else node.all_input_nodes
        return [source for source in read if self.kinds[source] is not Kind.CONSTANT]

    def vector(self, node: fx.Node, axis: int) -> np.ndarray:
        """The label of each channel of a value along an axis, int64; ``UNKNOWN`` where there is none."""
        labels = self.labels[node]
        if labels is not None:
            return labels.along(axis)
        shape = node.meta.get("shape")
        return np.full(0 if shape is None else shape[axis], UNKNOWN)

    def block_of(self, label: int) -> Block:
        """The block that a label is of."""
        return self.blocks[int(np.searchsorted(self._starts, label, "right")) - 1]

    def block_of_node(self, node: fx.Node) -> Block:
        """The labels that a layer made."""
        return next(block for block in self.blocks if block.node is node)

    @property
    def count(self) -> int:
        """How many labels there are, ``ZERO`` among them."""
        return self._next

    def _new(self, node: fx.Node, size: int, parents: tuple = (), carriers: tuple | None = None) -> int:
        start, self._next = self._next, self._next + size
        self.blocks.append(Block(node, start, size, parents, parents if carriers is None else carriers))
        return start

    def _channels(self, node: fx.Node, axis: int, size: int, parents: tuple = ()) -> Labels | None:
        """New labels, one a channel along an axis."""
        shape = node.meta.get("shape")
        if shape is None:
            return None
        start = self._new(node, size, parents)
        sizes = [1] * len(shape)
        sizes[axis % len(shape)] = size
        return Labels(torch.arange(start, start + size, dtype=torch.float64).view(sizes), shape)

    def _renewed(self, node: fx.Node, *read: Labels, carriers: Sequence[Labels] | None = None) -> Labels:
        """New labels, one for each combination of labels read."""
        shape = node.meta["shape"]
        rank = len(shape)
        aligned = [one.thin.reshape((1,) * (rank - one.thin.ndim) + tuple(one.thin.shape)) for one in read]
        together = torch.broadcast_tensors(*aligned)
        columns = [one.flatten().long().numpy() for one in together]
        key = columns[0].copy()
        for column in columns[1:]:  # one number for each combination: sorting these is fast
            key = key * (self._next + 1) + column
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        unique = np.stack([column[first] for column in columns], 1)
        blank = (unique < 1).all(axis=1)
        numbers = np.where(blank, unique.max(axis=1), 0)
        start = self._new(
            node,
            int((~blank).sum()),
            tuple(unique[~blank, place] for place in range(len(read))),
            tuple(unique[~blank, place] for place, one in enumerate(read) if carriers is None or one in carriers),
        )
        numbers[~blank] = np.arange(start, start + int((~blank).sum()))
        if (unique[blank] == UNKNOWN).any():
            numbers[blank & (unique == UNKNOWN).any(axis=1)] = UNKNOWN
        thin = torch.from_numpy(numbers[inverse.reshape(-1)].astype(np.float64)).reshape(together[0].shape)
        return Labels(thin, shape)

    def _kind(self, node: fx.Node) -> tuple[Kind, Labels | None]:
        if node.op == "placeholder":
            first = next(other for other in self.nodes if other.op == "placeholder")
            return (Kind.IMAGES if node is first else Kind.CONSTANT), None
        inputs = self.inputs(node)
        if node.op == "output":
            return Kind.MIXING, None
        if node.op == "get_attr" or is_number(node) or not inputs:
            return Kind.CONSTANT, None
        module = module_of(self.graph_module, node)
        if module is not None:
            return self._module_kind(node, module, self.labels[inputs[0]])
        return self._function_kind(node, inputs)

    def _module_kind(self, node: fx.Node, module: nn.Module, labels: Labels | None) -> tuple[Kind, Labels | None]:
        if isinstance(module, Preprocess):
            return Kind.IMAGES, None
        if isinstance(module, WEIGHTED):
            axis = -1 if isinstance(module, nn.Linear) else 1
            return Kind.WEIGHTED, self._channels(node, axis, len(module.weight))
        if isinstance(module, NORMS) and module.weight is None:
            return Kind.CHANNELWISE, None if labels is None else self._renewed(node, labels)
        if isinstance(module, NORMS):
            parents = self.vector(self.inputs(node)[0], 1)
            return Kind.NORM, self._channels(node, 1, module.num_features, (parents,))
        axis = -1 if isinstance(module, nn.LayerNorm) else 1
        plain = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
        parents = self.vector(self.inputs(node)[0], axis)
        if plain and isinstance(module.weight, Tensor) and (parents > 0).any():
            return Kind.LIVE_NORM, self._channels(node, axis, len(module.weight), (parents,))
        return Kind.LIVE_NORM, labels

    def _function_kind(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[Kind, Labels | None]:
        name, labels = operation(node), self.labels[inputs[0]]
        shape = node.meta.get("shape")
        if name == "mask_channels":
            return Kind.MASK, self._renewed(node, labels) if labels is not None else None
        if name in OPAQUE:
            return Kind.OPAQUE, None
        if name in ("mul", *_SUMS, *_QUOTIENTS):
            return self._arithmetic_kind(node, name, inputs)
        if name in _MOVES:
            moved = self._moved(node, inputs)
            kind = Kind.GATE if self.kinds[inputs[0]] is Kind.GATE and len(inputs) == 1 else Kind.ZERO_PRESERVING
            return (Kind.MIXING, None) if moved is None else (kind, moved)
        if labels is None or shape is None:
            return Kind.MIXING, None
        if name in _ZERO_PRESERVING:
            return (Kind.GATE if self.kinds[inputs[0]] is Kind.GATE else Kind.ZERO_PRESERVING), labels
        if name in _GATES:
            return Kind.GATE, self._renewed(node, labels)
        if name in _OTHER:
            return Kind.CHANNELWISE, self._renewed(node, labels)
        if name in _LIVE:
            return Kind.LIVE_NORM, labels
        if name in _SPATIAL and labels.steady(range(2, len(labels.shape))):
            return Kind.ZERO_PRESERVING, Labels(labels.thin, shape)
        if name in _REDUCTIONS:
            return self._reduced(node, labels, shape)
        if name in _SOFTMAX:
            axis = _argument(node, 1, "dim")
            if isinstance(axis, int) and labels.steady([axis]):
                return Kind.CHANNELWISE, self._renewed(node, labels)
        if name in PRODUCTS_OF_MATRICES:
            found = self._product_of_matrices(node, name, shape)
            if found is not None:
                return Kind.ZERO_PRESERVING, found
        return Kind.MIXING, None

    def _arithmetic_kind(self, node: fx.Node, name: str, inputs: list[fx.Node]) -> tuple[Kind, Labels | None]:
        shape = node.meta.get("shape")
        known = {source: self.labels[source] for source in inputs}
        read = [one for one in known.values() if one is not None]
        if not read or shape is None:
            return Kind.MIXING, None
        if len(inputs) == 1:
            scales = name == "mul" or (name in _QUOTIENTS and node.args[0] is inputs[0])
            if not scales:
                return Kind.CHANNELWISE, self._renewed(node, read[0])
            thin = read[0].thin
            thin = thin.reshape((1,) * (len(shape) - thin.ndim) + tuple(thin.shape))
            return (Kind.GATE if self.kinds[inputs[0]] is Kind.GATE else Kind.ZERO_PRESERVING), Labels(thin, shape)
        if name in _QUOTIENTS:
            return Kind.MIXING, None
        unknown = [Labels(torch.full((1,) * len(shape), float(UNKNOWN), dtype=torch.float64), shape)] * (
            len(inputs) - len(read)
        )
        if name in _SUMS:
            return Kind.SUM, self._renewed(node, *read, *unknown)
        carrying = [
            labels for source, labels in known.items()
            if labels is not None and self.kinds[source] is not Kind.GATE and not self._is_broadcast(source, shape)
        ]  # fmt: skip
        return Kind.PRODUCT, self._renewed(node, *read, *unknown, carriers=carrying or read)

    def _is_broadcast(self, source: fx.Node, shape: torch.Size) -> bool:
        """Whether a value is a number for each channel of a map: it scales what it is multiplied with."""
        own = source.meta.get("shape")
        return own is not None and len(shape) > 2 and math.prod(own) < math.prod(shape)

    def _moved(self, node: fx.Node, inputs: list[fx.Node]) -> Labels | None:
        """The labels after a movement, by doing it to the labels."""
        if not any(self.labels[source] is not None or source in self._pieces for source in inputs):
            return None
        name = operation(node)

        def stand_in(source: fx.Node) -> Any:
            if source in self._pieces:
                return self._pieces[source]
            labels = self.labels[source]
            if labels is not None:
                return labels.full
            if self.kinds[source] is Kind.CONSTANT:
                value = self._constant(source)
                if isinstance(value, Tensor) and name in ("cat", "concat", "concatenate", "stack", "hstack"):
                    return torch.where(value == 0, float(ZERO), float(UNKNOWN)).double()
                return value
            return torch.full(source.meta["shape"], float(UNKNOWN), dtype=torch.float64)

        try:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), stand_in)
            if name == "pad" and (args[3] if len(args) > 3 else kwargs.get("value")):
                args, kwargs = args[:3], {**kwargs, "value": float(UNKNOWN)}
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                result = node.target(*args, **kwargs)
        except Exception:  # labels of another dtype than the operation takes, an index that depends on the images, ...
            return None
        if isinstance(result, tuple | list):
            self._pieces[node] = result
            return (
                None if not result else Labels(torch.full((1,), float(UNKNOWN), dtype=torch.float64), torch.Size([1]))
            )
        return _thin(result) if isinstance(result, Tensor) and result.shape == node.meta.get("shape") else None

    def _constant(self, node: fx.Node) -> Any:
        """The value that a node has for two images."""
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph_module).cpu()
        if node.target is getattr and node.args[1] == "device":
            return torch.device("cpu")
        if node.op == "call_method" and node.target == "size":
            return 2
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._constant)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _reduced(self, node: fx.Node, labels: Labels, shape: torch.Size) -> tuple[Kind, Labels | None]:
        """Means, sums or maxima over axes that are no channels."""
        axes = _argument(node, 2 if operation(node) == "norm" else 1, "dim")
        axes = [axes] if isinstance(axes, int) else axes
        if not isinstance(axes, list | tuple) or not axes or not all(isinstance(axis, int) for axis in axes):
            return Kind.MIXING, None
        if not labels.steady(axes):
            return Kind.MIXING, None
        rank = len(labels.shape)
        gone = {axis % rank for axis in axes}
        thin = labels.thin
        if len(shape) < rank:
            thin = thin.reshape([size for axis, size in enumerate(thin.shape) if axis not in gone])
        return Kind.ZERO_PRESERVING, Labels(thin, shape)

    def _product_of_matrices(self, node: fx.Node, name: str, shape: torch.Size) -> Labels | None:
        """A product with a matrix without channels, as attention's weights are: it mixes positions, not channels."""
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if name == "einsum":
            return self._einsum(node, shape)
        if name == "scaled_dot_product_attention":
            values = self.labels[operands[2]]
            steady = values is not None and values.steady([-2])
            return (
                Labels(values.thin, shape)
                if values is not None and steady and len(values.shape) == len(shape)
                else None
            )
        if name == "baddbmm" or len(operands) != 2:
            return None
        first, second = (self.labels.get(one) for one in operands)
        if first is None and second is not None and second.steady([-2]) and len(second.shape) == len(shape):
            return Labels(second.thin, shape)
        if second is None and first is not None and first.steady([-1]) and len(first.shape) == len(shape):
            return Labels(first.thin, shape)
        return None

    def _einsum(self, node: fx.Node, shape: torch.Size) -> Labels | None:
        equation, operands = (
            str(node.args[0]).replace(" ", ""),
            [arg for arg in node.args[1:] if isinstance(arg, fx.Node)],
        )
        read, arrow, out = equation.partition("->")
        letters = read.split(",")
        known = [
            (one, self.labels[one], of)
            for one, of in zip(operands, letters, strict=False)
            if self.labels.get(one) is not None
        ]
        if not arrow or len(known) != 1 or "." in equation or len(letters) != len(operands):
            return None
        _, labels, of = known[0]
        assert labels is not None
        if not labels.steady([place for place, letter in enumerate(of) if letter not in out]):
            return None
        thin = labels.thin.squeeze([place for place, letter in enumerate(of) if letter not in out])
        kept = [letter for letter in of if letter in out]
        thin = thin.permute([kept.index(letter) for letter in out if letter in kept])
        for place, letter in enumerate(out):
            if letter not in kept:
                thin = thin.unsqueeze(place)
        return Labels(thin, shape)


def _thin(labels: Tensor) -> Labels:
    """Labels with one entry along each axis on which they do not change."""
    shape = labels.shape
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            first = labels.narrow(axis, 0, 1)
            if labels.stride(axis) == 0 or bool((labels == first).all()):
                labels = first
    return Labels(labels, shape)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
