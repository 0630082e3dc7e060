"""Where the channels of a value come from, and which channels belong together."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from .channels import PRODUCTS_OF_MATRICES, Channels, Kind, module_of, operation


@dataclass(frozen=True, eq=False)
class Source:
    """A layer that writes into some channels.

    Attributes:
        node: of the graph.
        norms: the normalisations passed on the way, the last one first.
        channels: for each place asked about, the channel of that layer that is there, -1 for none; int64 (places,).
    """

    node: fx.Node
    norms: tuple[fx.Node, ...]
    channels: np.ndarray


def sources(
    channels: Channels, labels: np.ndarray, stop: set[fx.Node] | frozenset[fx.Node] = frozenset()
) -> Iterator[Source]:
    """Walk back from labels to the layers that their channels come from, the nearest first.

    Args:
        channels: of the graph.
        labels: int64 (places,).
        stop: nodes to yield and not to pass, beside weighted layers.

    Yields:
        Each weighted or ``stop`` node reached, once.
    """
    front: list[tuple[np.ndarray, tuple[fx.Node, ...]]] = [(labels, ())]
    seen: set[tuple[int, bytes]] = set()
    while front:
        places, norms = front.pop(0)
        open_places = places > 0
        while open_places.any():
            block = channels.block_of(int(places[np.argmax(open_places)]))
            inside = (places >= block.start) & (places < block.start + block.size)
            open_places &= ~inside
            found = np.where(inside, places - block.start, -1)
            key = (block.start, found.tobytes())
            if key in seen:
                continue
            seen.add(key)
            kind = channels.kinds[block.node]
            if block.node in stop or kind is Kind.WEIGHTED:
                yield Source(block.node, norms, found)
                continue
            passed = (*norms, block.node) if kind in (Kind.NORM, Kind.LIVE_NORM) else norms
            front.extend((np.where(inside, parents[found], -1), passed) for parents in block.carriers)


def last_layers(channels: Channels) -> set[fx.Node]:
    """The layers that the logits come from: nothing with weights lies behind them."""
    front = [node for node in channels.nodes if node.op == "output"]
    found, seen = set(), set()
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        if channels.kinds[node] is Kind.WEIGHTED:
            found.add(node)
        elif channels.kinds[node] is not Kind.OPAQUE:
            front.extend(channels.inputs(node))
    return found


def classes(channels: Channels, depthwise: bool = False) -> np.ndarray:
    """For each label the number of its class: channels that sums, products and normalisations join one by one are of one.

    Args:
        channels: of the graph.
        depthwise: whether a depthwise convolution joins what it reads with what it writes, too.
    """
    pairs = [(np.arange(channels.count), np.arange(channels.count))]
    for block in channels.blocks:
        parents = block.parents
        if depthwise and channels.kinds[block.node] is Kind.WEIGHTED and is_depthwise(channels, block.node):
            parents = (channels.vector(channels.inputs(block.node)[0], 1),)
        own = np.arange(block.start, block.start + block.size)
        pairs += [(own[one > 0], one[one > 0]) for one in parents]
    first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
    links = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(channels.count, channels.count))
    return connected_components(links, directed=False)[1]


def is_depthwise(channels: Channels, node: fx.Node) -> bool:
    """Whether the node is a convolution each of whose outputs reads the one input of the same number."""
    module = module_of(channels.graph_module, node)
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0)


def heads(channels: Channels) -> list[dict[fx.Node, np.ndarray]]:
    """The heads of each attention: for its layers of values, queries and keys, in this order, the head of each channel.

    A head is what is multiplied apart from the others: one matrix of the batch of matrices. -1 is a channel of none.
    """
    found = []
    for node in channels.nodes:
        operands = _operands(channels, node)
        if operands is None:
            continue
        values, queries, keys = operands
        layers: dict[fx.Node, np.ndarray] = {}
        counts = set()
        for operand in (values, queries, keys):
            rows = None if operand is None else _rows(channels, operand)
            if rows is None:
                continue
            for head, labels in enumerate(rows):
                for source in sources(channels, labels):
                    size = channels.block_of_node(source.node).size
                    own = layers.setdefault(source.node, np.full(size, -1))
                    own[source.channels[source.channels >= 0]] = head
            counts.add(len(rows))
        if layers and len(counts) == 1 and counts.pop() > 1:
            found.append(layers)
    return found


def _operands(channels: Channels, node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None] | None:
    """Values, queries and keys of an attention whose product with the values the node is."""
    name = operation(node)
    arguments = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if name == "scaled_dot_product_attention" and len(arguments) >= 3:
        return arguments[2], arguments[0], arguments[1]
    if name not in ("matmul", "bmm") or len(arguments) != 2:
        return None
    weights, values = arguments
    if channels.labels.get(weights) is not None:
        weights, values = values, weights
    if channels.labels.get(weights) is not None or channels.labels.get(values) is None:
        return None
    while weights is not None and operation(weights) not in PRODUCTS_OF_MATRICES:  # back over softmax, scale and bias
        read = channels.inputs(weights)
        if not read or channels.kinds[weights] is Kind.WEIGHTED:
            return None
        weights = read[0]
    compared = [arg for arg in weights.args if isinstance(arg, fx.Node) and channels.labels.get(arg) is not None]
    return (values, compared[0], compared[1]) if len(compared) == 2 else None


def _rows(channels: Channels, node: fx.Node) -> list[np.ndarray] | None:
    """The labels of each matrix of a batch of matrices, those of one image."""
    labels = channels.labels[node]
    if labels is None or len(labels.shape) < 3:
        return None
    full = labels.full.flatten(0, -3)
    rows: dict[bytes, np.ndarray] = {}
    for matrix in full:
        unique = np.unique(matrix.long().numpy())
        rows.setdefault(unique.tobytes(), unique)
    found = list(rows.values())
    together = np.concatenate(found)
    return found if len(np.unique(together)) == len(together) else None  # heads share no channel
