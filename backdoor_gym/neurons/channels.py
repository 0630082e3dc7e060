"""What each node of a traced network does to channels, and where they are in its value.

Every channel that a layer gives has a *label*, a number of its own. Movements (reshaping, slicing, ...) are done to the labels,
in whatever way they are written. A sum of two channels has a new label with both as parents. What mixes channels has no labels.
"""

import math
import operator
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..networks.preprocessing import Preprocess
from . import operations
from .joining import is_number
from .labels import UNKNOWN, ZERO, Block, Labels
from .lowering import Lowered
from .operations import operation

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


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


_MIXED = (Kind.MIXING, None)


class Filled(NamedTuple):
    """A mask of a layer with what its pruned channels give instead of zero.

    Attributes:
        mask: (channels,); None leaves everything.
        fill: a constant of each channel, (channels,).
    """

    mask: Tensor | None
    fill: Tensor


#: What a layer is masked with: None where nothing is pruned.
Mask = Tensor | Filled | None


def filled(masks: Sequence[Tensor | None], fills: Sequence[Tensor | None]) -> list[Mask]:
    """Masks of layers with the constants of those that have any."""
    return [mask if fill is None else Filled(mask, fill) for mask, fill in zip(masks, fills, strict=True)]


def mask_channels(values: Tensor, mask: Mask, axis: int = 1, unit_of: Tensor | None = None) -> Tensor:
    """The values times a mask of zeros and ones along their channels' axis, 1 or -1; None leaves everything.

    The mask is of channels, or of units where ``unit_of``, int64 (channels,), says which one each channel is of (-1 for none).
    With constants (``Filled``, of channels alone) it mixes the values with these: ``values * mask + fill * (1 - mask)``.
    """
    if isinstance(mask, Filled):
        kept = mask_channels(values, mask.mask, axis)
        if mask.mask is None:
            return kept
        return kept + along_channels(mask.fill * (1 - mask.mask), values.ndim, axis)
    if mask is None:
        return values
    if unit_of is not None:
        mask = torch.where(unit_of >= 0, mask[unit_of], torch.ones((), dtype=mask.dtype, device=mask.device))
    return values * along_channels(mask, values.ndim, axis)


def along_channels(numbers: Tensor, rank: int, axis: int = 1) -> Tensor:
    """A number of each channel, (channels,), as it is multiplied with values of so many axes: along axis 1, or the last one."""
    return numbers if axis == -1 else numbers.view(-1, *[1] * (rank - 2))


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that the node calls, if it calls one."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


class Channels:
    """What each node of a traced network does to channels, and where the channels of its value are.

    ::

        node            kind              labels of its value      blocks
        images          IMAGES            None
        conv1           WEIGHTED          [1, 2]                   conv1 made 1, 2
        relu            ZERO_PRESERVING   [1, 2]
        conv2           WEIGHTED          [3, 4]                   conv2 made 3, 4
        relu + conv2    SUM               [5, 6]                   the sum made 5 of (1, 3), 6 of (2, 4)

    Attributes:
        kinds: of each node.
        labels: of each node's value, None where no channel is known in it.
        blocks: all labels, in the order in which they were made.
        lowered: where each layer comes from.
        count: how many labels there are, ``ZERO`` among them.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.lowered: dict[str, Lowered] = graph_module.meta["lowered"]
        self.kinds: dict[fx.Node, Kind] = {}
        self.labels: dict[fx.Node, Labels | None] = {}
        self.blocks: list[Block] = []
        self.count = 1
        self._pieces: dict[fx.Node, Any] = {}
        for node in self.nodes:
            self.kinds[node], self.labels[node] = self._follow(node)
        self._starts = np.array([block.start for block in self.blocks])
        self._block_of = {block.node: block for block in reversed(self.blocks)}

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values the node reads, without constants and what is only asked for its shape."""
        read = node.all_input_nodes[:1] if operation(node) in operations.LIKE_ANOTHER else node.all_input_nodes
        return [source for source in read if self.kinds[source] is not Kind.CONSTANT]

    def axis(self, node: fx.Node) -> int:
        """The axis of a layer's channels, in what it reads and in what it gives: 1, or -1 for the last one."""
        return -1 if isinstance(module_of(self.graph_module, node), nn.Linear | nn.LayerNorm) else 1

    def made(self, node: fx.Node) -> np.ndarray:
        """The label of each channel that a layer gives, int64; ``UNKNOWN`` where there is none."""
        return self._vector(node, self.axis(node))

    def read(self, node: fx.Node) -> np.ndarray:
        """The label of each channel that a layer reads, likewise."""
        return self._vector(self.inputs(node)[0], self.axis(node))

    def _vector(self, node: fx.Node, axis: int) -> np.ndarray:
        labels = self.labels[node]
        if labels is not None:
            return labels.along(axis)
        shape = node.meta.get("shape")
        return np.full(0 if shape is None else shape[axis], UNKNOWN)

    def block(self, label: int) -> Block:
        """The block that a label is of."""
        return self.blocks[int(np.searchsorted(self._starts, label, "right")) - 1]

    def size(self, node: fx.Node) -> int:
        """How many channels a convolution or linear layer gives."""
        return self._block_of[node].size

    def layer(self, node: fx.Node) -> Lowered | None:
        """Where the layer comes from that a node calls, None where it calls none."""
        return self.lowered.get(str(node.target)) if node.op == "call_module" else None

    def uses(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that call a layer with the weights of this node's."""
        weights = self._weights(node)
        return [other for other in self.nodes if self.layer(other) is not None and self._weights(other) == weights]

    def _weights(self, node: fx.Node) -> Any:
        layer = self.layer(node)
        return layer.weight if layer is not None and layer.weight else node.target

    def _make(self, node: fx.Node, size: int, parents: tuple = (), carriers: tuple | None = None) -> np.ndarray:
        block = Block(node, self.count, size, parents, parents if carriers is None else carriers)
        self.blocks.append(block)
        self.count += size
        return block.own

    def _made_along(self, node: fx.Node, axis: int, size: int, parents: tuple = ()) -> Labels | None:
        """New labels, one for each place along an axis."""
        shape = node.meta.get("shape")
        if shape is None:
            return None
        sizes = [1] * len(shape)
        sizes[axis] = size
        own = self._make(node, size, parents)
        return Labels(torch.from_numpy(own.astype(np.float64)).view(sizes), shape)

    def _renewed(self, node: fx.Node, *read: Labels, carriers: Sequence[Labels] | None = None) -> Labels:
        """New labels, one for each combination of labels read."""
        shape = node.meta["shape"]
        together = torch.broadcast_tensors(*(labels.aligned(len(shape)) for labels in read))
        columns = [thin.flatten().long().numpy() for thin in together]
        key = columns[0].copy()
        for column in columns[1:]:  # one number for each combination: sorting these is fast
            key = key * (self.count + 1) + column
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        unique = np.stack([column[first] for column in columns], 1)
        blank = (unique < 1).all(axis=1)
        numbers = np.where(blank, unique.min(axis=1), 0)  # unknown where anything is
        parents = tuple(unique[~blank].T)
        carrying = tuple(
            column for column, labels in zip(parents, read, strict=True) if carriers is None or labels in carriers
        )
        numbers[~blank] = self._make(node, int((~blank).sum()), parents, carrying)
        thin = torch.from_numpy(numbers[inverse.reshape(-1)].astype(np.float64)).reshape(together[0].shape)
        return Labels(thin, shape)

    def _follow(self, node: fx.Node) -> tuple[Kind, Labels | None]:
        if node.op == "placeholder":
            return (Kind.CONSTANT if self.kinds else Kind.IMAGES), None
        if node.op == "output":
            return _MIXED
        inputs = self.inputs(node)
        if node.op == "get_attr" or is_number(node) or not inputs:
            return Kind.CONSTANT, None
        module = module_of(self.graph_module, node)
        if module is not None:
            return self._follow_module(node, module, self.labels[inputs[0]])
        return self._follow_function(node, inputs)

    def _follow_module(self, node: fx.Node, module: nn.Module, labels: Labels | None) -> tuple[Kind, Labels | None]:
        if isinstance(module, Preprocess):
            return Kind.IMAGES, None
        axis = self.axis(node)
        if isinstance(module, WEIGHTED):
            return Kind.WEIGHTED, self._made_along(node, axis, len(module.weight))
        if isinstance(module, NORMS) and module.weight is None:
            return Kind.CHANNELWISE, None if labels is None else self._renewed(node, labels)
        parents = self.read(node)
        if isinstance(module, NORMS):
            return Kind.NORM, self._made_along(node, axis, module.num_features, (parents,))
        plain = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
        if plain and isinstance(module.weight, Tensor) and (parents > 0).any():
            return Kind.LIVE_NORM, self._made_along(node, axis, len(module.weight), (parents,))
        return Kind.LIVE_NORM, labels

    def _follow_function(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[Kind, Labels | None]:
        name, labels, shape = operation(node), self.labels[inputs[0]], node.meta.get("shape")
        keeping = Kind.GATE if self.kinds[inputs[0]] is Kind.GATE else Kind.ZERO_PRESERVING
        if name == "mask_channels":
            return Kind.MASK, None if labels is None else self._renewed(node, labels)
        if name in operations.OPAQUE:
            return Kind.OPAQUE, None
        if name in ("mul", *operations.SUMS, *operations.QUOTIENTS):
            return self._follow_arithmetic(node, name, inputs)
        moved: Labels | None = None
        if name in operations.MOVES:
            moved = self._moved(node, inputs)
            return _MIXED if moved is None else (keeping if len(inputs) == 1 else Kind.ZERO_PRESERVING, moved)
        if labels is None or shape is None:
            return _MIXED
        if name in operations.ZERO_PRESERVING:
            return keeping, labels
        if name in operations.GATES:
            return Kind.GATE, self._renewed(node, labels)
        if name in operations.ZERO_CHANGING:
            return Kind.CHANNELWISE, self._renewed(node, labels)
        if name in operations.NORMALISATIONS:
            return Kind.LIVE_NORM, labels
        if name in operations.SOFTMAX:
            axis = _argument(node, 1, "dim")
            follows = isinstance(axis, int) and labels.steady([axis])
            return (Kind.CHANNELWISE, self._renewed(node, labels)) if follows else _MIXED
        if name in operations.SPATIAL and labels.steady(range(2, len(labels.shape))):
            moved = Labels(labels.thin, shape)
        elif name in operations.REDUCTIONS:
            moved = _reduced(node, labels, shape)
        elif name in operations.PRODUCTS_OF_MATRICES:
            moved = self._product_of_matrices(node, name, shape)
        return _MIXED if moved is None else (Kind.ZERO_PRESERVING, moved)

    def _follow_arithmetic(self, node: fx.Node, name: str, inputs: list[fx.Node]) -> tuple[Kind, Labels | None]:
        shape = node.meta.get("shape")
        known = {source: labels for source in inputs if (labels := self.labels[source]) is not None}
        if not known or shape is None:
            return _MIXED
        read = list(known.values())
        if len(inputs) == 1:
            scales = name == "mul" or (name in operations.QUOTIENTS and node.args[0] is inputs[0])
            if not scales:
                return Kind.CHANNELWISE, self._renewed(node, read[0])
            keeping = Kind.GATE if self.kinds[inputs[0]] is Kind.GATE else Kind.ZERO_PRESERVING
            return keeping, Labels(read[0].aligned(len(shape)), shape)
        if name in operations.QUOTIENTS:
            return _MIXED
        unknown = [Labels.unknown(shape)] * (len(inputs) - len(read))
        if name in operations.SUMS:
            return Kind.SUM, self._renewed(node, *read, *unknown)
        carrying = [
            labels for source, labels in known.items()
            if self.kinds[source] is not Kind.GATE and not _scales(source.meta.get("shape"), shape)
        ]  # fmt: skip
        return Kind.PRODUCT, self._renewed(node, *read, *unknown, carriers=carrying or read)

    def _moved(self, node: fx.Node, inputs: list[fx.Node]) -> Labels | None:
        """The labels after a movement, by doing it to the labels."""
        if not any(self.labels[source] is not None or source in self._pieces for source in inputs):
            return None
        name = operation(node)

        def stand_in(source: fx.Node) -> Any:
            if source in self._pieces:
                return self._pieces[source]
            if self.kinds[source] is Kind.CONSTANT:
                value = self._constant(source)
                if isinstance(value, Tensor) and name in operations.JOINS:
                    return torch.where(value == 0, float(ZERO), float(UNKNOWN)).double()
                return value
            return (self.labels[source] or Labels.unknown(source.meta["shape"])).full

        try:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), stand_in)
            if name == "pad" and (args[3] if len(args) > 3 else kwargs.get("value")):
                args, kwargs = args[:3], {**kwargs, "value": float(UNKNOWN)}
            result = _call(node, args, kwargs)
        except Exception:  # labels of another dtype than the operation takes, an index that depends on the images, ...
            return None
        if isinstance(result, tuple | list):
            self._pieces[node] = result
            return Labels.unknown(torch.Size([1])) if result else None
        return Labels.of(result) if isinstance(result, Tensor) and result.shape == node.meta.get("shape") else None

    def _constant(self, node: fx.Node) -> Any:
        """The value that a node has for two images."""
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph_module).cpu()
        if node.target is getattr and node.args[1] == "device":
            return torch.device("cpu")
        if node.op == "call_method" and node.target == "size":
            return 2
        return _call(node, *fx.node.map_arg((node.args, dict(node.kwargs)), self._constant))

    def _product_of_matrices(self, node: fx.Node, name: str, shape: torch.Size) -> Labels | None:
        """A product with a matrix without channels, as attention's weights are: it mixes positions, not channels."""
        operands = [self.labels.get(argument) for argument in node.args if isinstance(argument, fx.Node)]
        if name == "einsum":
            return _summed(str(node.args[0]), operands, shape)
        followed: Labels | None = None
        if name == "scaled_dot_product_attention":
            followed, axis = operands[2], -2
        elif name != "baddbmm" and len(operands) == 2 and None in operands:
            followed, axis = (operands[1], -2) if operands[0] is None else (operands[0], -1)
        if followed is None or not followed.steady([axis]) or len(followed.shape) != len(shape):
            return None
        return Labels(followed.thin, shape)


def _scales(own: torch.Size | None, shape: torch.Size) -> bool:
    """Whether a factor is a number for each channel of a map: it scales what it is multiplied with."""
    return own is not None and len(shape) > 2 and math.prod(own) < math.prod(shape)


def _reduced(node: fx.Node, labels: Labels, shape: torch.Size) -> Labels | None:
    """Labels of means, sums or maxima over axes that are no channels."""
    axes = _argument(node, 2 if operation(node) == "norm" else 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, list | tuple) or not axes or not all(isinstance(axis, int) for axis in axes):
        return None
    if not labels.steady(axes):
        return None
    rank, thin = len(labels.shape), labels.thin
    if len(shape) < rank:
        gone = {axis % rank for axis in axes}
        thin = thin.reshape([size for axis, size in enumerate(thin.shape) if axis not in gone])
    return Labels(thin, shape)


def _summed(equation: str, operands: Sequence[Labels | None], shape: torch.Size) -> Labels | None:
    """Labels of an einsum of which one operand alone has channels, and does not sum over them."""
    read, arrow, out = equation.replace(" ", "").partition("->")
    letters = read.split(",")
    known = [(labels, axes) for labels, axes in zip(operands, letters, strict=False) if labels is not None]
    if not arrow or len(known) != 1 or "." in equation or len(letters) != len(operands):
        return None
    labels, axes = known[0]
    if not labels.steady([place for place, letter in enumerate(axes) if letter not in out]):
        return None
    thin = torch.einsum(f"{axes}->{''.join(letter for letter in out if letter in axes)}", labels.thin)
    return Labels(thin[tuple(slice(None) if letter in axes else None for letter in out)], shape)


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node's function or method gives for other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
