"""Products with weights that no layer of the graph holds, such as ``features @ self.text.T`` or distances from prototypes."""

import math
from collections.abc import Iterable

import torch
from torch import fx

from .channels import Channels, Kind
from .operations import MOVES, NORMALISATIONS, PRODUCTS_OF_MATRICES, SPATIAL, operation

#: Kinds of operations that leave each channel by itself.
_FOLLOWED = (Kind.MASK, Kind.ZERO_PRESERVING, Kind.CHANNELWISE, Kind.GATE, Kind.SUM, Kind.PRODUCT)
#: Operations that take constants beside what they read, or as a layer of its own.
_NO_PRODUCTS = MOVES | SPATIAL | NORMALISATIONS
#: Products that may give as many entries as they read.
_PRODUCTS = PRODUCTS_OF_MATRICES | {"inner", "linalg_multi_dot", "chain_matmul", "kron", "cosine_similarity"}
#: Those whose last axis is what the weights make.
_LAST_AXIS = frozenset(
    {
        "inner",
        "tensordot",
        "addmm",
        "addbmm",
        "baddbmm",
        "embedding",
        "cdist",
        "linear",
        "bilinear",
        "cosine_similarity",
    }
)


def products(channels: Channels) -> dict[fx.Node, list[fx.Node]]:
    """The operations with weights that are no layer's, and these weights: constants of the graph.

    ::

        features @ w                              a product of matrices, or an unknown operation that mixes channels
        (features.unsqueeze(1) - w).norm(dim=-1)  a value for each channel, and then one of all channels
        lstm(x, w, ...)                           an operation in which no neuron is looked for; none where the weights
                                                  themselves are computed from images alone
    """
    joined = _joined_afterwards(channels)
    made: dict[fx.Node, list[fx.Node]] = {}
    for node in channels.nodes:
        weights = _weights(channels, node, node in joined)
        if channels.kinds[node] is Kind.OPAQUE and not weights:  # they are computed from the images, by weights in turn
            for source in _behind(channels, node.all_input_nodes[1:]):
                weights += made.pop(source, [])
        if weights or channels.kinds[node] is Kind.OPAQUE:
            made[node] = weights
    return made


def size_of(channels: Channels, node: fx.Node, weights: fx.Node) -> int:
    """How many channels such an operation makes by some of its weights."""
    name, own = operation(node), weights.meta["shape"]
    shape: torch.Size = node.meta.get("shape") or torch.Size()
    if name == "einsum":
        return _size_of_einsum(node, weights)
    if name.startswith("conv"):
        return shape[1] if shape[0] > 1 else shape[1] // 2  # of two images, as groups of one
    if name in ("matmul", "mm", "bmm"):
        return own[-2 if node.args[0] is weights and len(own) > 1 else -1]
    if name in _LAST_AXIS and shape:
        return shape[-1]
    if name in _PRODUCTS:
        return own[-1]
    if channels.labels[node] is not None:
        axes = _axes(channels, node)
        return math.prod(size for axis, size in enumerate(own, len(shape) - len(own)) if axis not in axes)
    return own[0]


def keeps_channels(channels: Channels, node: fx.Node) -> bool:
    """Whether such an operation leaves channels as they are, as weights of positions do."""
    return operation(node) in _PRODUCTS and channels.labels[node] is not None


def _weights(channels: Channels, node: fx.Node, is_joined: bool) -> list[fx.Node]:
    """The constants that a node makes channels by."""
    kind, name = channels.kinds[node], operation(node)
    shape: torch.Size = node.meta.get("shape") or torch.Size()
    if node.op not in ("call_function", "call_method") or kind is Kind.CONSTANT:
        return []
    if name in _NO_PRODUCTS:
        return []
    is_attention = name == "scaled_dot_product_attention"  # it takes a bias as well
    held = _constants(channels, node.args[:3] if is_attention else node.all_input_nodes)
    if kind is Kind.OPAQUE:
        return [source for source in held if len(source.meta["shape"]) > 1]
    matrices = [source for source in held if sum(size > 1 for size in source.meta["shape"]) > 1]
    if name in _PRODUCTS:
        return matrices
    if not _is_entry_by_entry(node):
        return matrices if kind is Kind.MIXING else []
    if channels.labels[node] is not None:
        return [source for source in held if math.prod(source.meta["shape"]) > 1] if is_joined else []
    # Where no channel is known: a value against several, as in distances.
    grows = all(math.prod(source.meta.get("shape") or shape) < math.prod(shape) for source in channels.inputs(node))
    return matrices if grows and name != "add" else []


def _constants(channels: Channels, operands: Iterable[object]) -> list[fx.Node]:
    """The floating-point tensors that those of the operands which are constants are made of."""
    front = [source for source in operands if isinstance(source, fx.Node) and channels.kinds[source] is Kind.CONSTANT]
    tensors = {
        source: getattr(channels.graph_module, str(source.target))
        for source in _behind(channels, front)
        if source.op == "get_attr"
    }
    return [source for source, tensor in tensors.items() if tensor.is_floating_point()]


def _behind(channels: Channels, front: Iterable[fx.Node]) -> list[fx.Node]:
    """These nodes and what they are computed from, back to layers and images."""
    waiting, reached = list(front), dict.fromkeys(front)
    while waiting:
        node = waiting.pop()
        if channels.kinds[node] not in (Kind.WEIGHTED, Kind.OPAQUE, Kind.IMAGES):
            waiting += [source for source in node.all_input_nodes if source not in reached]
            reached.update(dict.fromkeys(node.all_input_nodes))
    return list(reached)


def _is_entry_by_entry(node: fx.Node) -> bool:
    """Whether the value has the form that its operands have together."""
    shapes = [source.meta["shape"] for source in node.all_input_nodes if source.meta.get("shape") is not None]
    try:
        return torch.broadcast_shapes(*shapes) == node.meta.get("shape")
    except RuntimeError:
        return False


def _joined_afterwards(channels: Channels) -> set[fx.Node]:
    """The nodes whose channels stay apart only until all are summed, or joined otherwise, into a single value."""
    joined: set[fx.Node] = set()
    for node in reversed(channels.nodes):
        ends = [
            _joins(channels, user, node) or (user in joined and channels.kinds[user] in _FOLLOWED)
            for user in node.users
        ]
        if ends and all(ends):
            joined.add(node)
    return joined


def _joins(channels: Channels, node: fx.Node, read: fx.Node) -> bool:
    """Whether a node makes a single value of all channels of the one that it reads."""
    if channels.labels[node] is not None or channels.labels[read] is None or node.all_input_nodes != [read]:
        return False
    axes = _axes(channels, read)
    results = (node, *node.users)  # of several results the first one that is read
    shape = next((source.meta["shape"] for source in results if source.meta.get("shape") is not None), None)
    if len(axes) != 1 or shape is None:
        return False
    rest = iter([size for axis, size in enumerate(read.meta["shape"]) if axis not in axes])
    return all(size in rest for size in shape if size > 1)


def _axes(channels: Channels, node: fx.Node) -> list[int]:
    """The axes along which the channels of a value differ."""
    labels = channels.labels[node]
    assert labels is not None
    return [axis for axis, size in enumerate(labels.aligned(len(labels.shape)).shape) if size > 1]


def _size_of_einsum(node: fx.Node, weights: fx.Node) -> int:
    """The sizes of the letters that stand in the result and that the weights alone have."""
    read, arrow, out = str(node.args[0]).replace(" ", "").replace(".", "").partition("->")
    letters = read.split(",")
    own = letters.pop(node.all_input_nodes.index(weights)) if weights in node.all_input_nodes else letters.pop()
    sizes = zip(reversed(own), reversed(weights.meta["shape"]), strict=False)
    return math.prod(size for letter, size in sizes if letter not in "".join(letters) and (not arrow or letter in out))
