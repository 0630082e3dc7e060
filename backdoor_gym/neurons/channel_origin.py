"""Where the channels of a value come from, and which channels belong together."""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from .channels import Channels, Kind, module_of
from .operations import PRODUCTS_OF_MATRICES, operation
from .products import keeps_channels, products


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


def sources(channels: Channels, labels: np.ndarray, stop: Set[fx.Node] = frozenset()) -> Iterator[Source]:
    """Walk back from labels, int64 (places,), to the layers that their channels come from, the nearest first.

    Weighted layers and the nodes of ``stop`` are yielded, each once, and not passed.
    """
    front: list[tuple[np.ndarray, tuple[fx.Node, ...]]] = [(labels, ())]
    seen: set[tuple[int, bytes]] = set()
    while front:
        places, norms = front.pop(0)
        left = places > 0
        while left.any():
            block = channels.block(int(places[np.argmax(left)]))
            inside = (places >= block.start) & (places < block.start + block.size)
            left &= ~inside
            numbers = np.where(inside, places - block.start, -1)
            key = (block.start, numbers.tobytes())
            if key in seen:
                continue
            seen.add(key)
            kind = channels.kinds[block.node]
            if block.node in stop or kind is Kind.WEIGHTED:
                yield Source(block.node, norms, numbers)
                continue
            passed = (*norms, block.node) if kind in (Kind.NORM, Kind.LIVE_NORM) else norms
            front.extend((np.where(inside, parents[numbers], -1), passed) for parents in block.carriers)


def last_layers(channels: Channels) -> set[fx.Node]:
    """The layers and other products with weights that the logits come from: nothing with weights lies behind them."""
    last, reached, others = set(), {channels.nodes[-1]}, products(channels)
    for node in reversed(channels.nodes):
        if node not in reached:
            continue
        if channels.kinds[node] is Kind.WEIGHTED or (node in others and not keeps_channels(channels, node)):
            last.add(node)
        else:
            reached.update(channels.inputs(node))
    return last


def classes(channels: Channels, depthwise: bool = False) -> np.ndarray:
    """For each label the number of its class: sums, products and normalisations put what they join into one class.

    With ``depthwise`` a depthwise convolution does so, too, with what it reads and what it writes.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for block in channels.blocks:
        parents = block.parents
        if depthwise and channels.kinds[block.node] is Kind.WEIGHTED and is_depthwise(channels, block.node):
            parents = (channels.read(block.node),)
        pairs += [(block.own[column > 0], column[column > 0]) for column in parents]
    return joined(channels.count, pairs)


def joined(count: int, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For each of so many numbers that of its set, int64 (count,); each pair joins its numbers one by one, int64 (n,)."""
    first, second = (np.concatenate(side) for side in zip((np.arange(count),) * 2, *pairs, strict=True))
    links = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(count, count))
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
    attentions = []
    for node in channels.nodes:
        layers: dict[fx.Node, np.ndarray] = {}
        counts = set()
        for operand in _operands(channels, node):
            matrices = _matrices(channels, operand)
            if matrices is None:
                continue
            counts.add(len(matrices))
            for head, labels in enumerate(matrices):
                for source in sources(channels, labels):
                    own = layers.setdefault(source.node, np.full(channels.size(source.node), -1))
                    own[source.channels[source.channels >= 0]] = head
        if layers and len(counts) == 1 and counts.pop() > 1:
            attentions.append(layers)
    return attentions


def _operands(channels: Channels, node: fx.Node) -> tuple[fx.Node, ...]:
    """Values, queries and keys, if the node is an attention's product with the values."""
    name = operation(node)
    arguments = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if name == "scaled_dot_product_attention" and len(arguments) >= 3:
        return arguments[2], arguments[0], arguments[1]
    if name not in ("matmul", "bmm") or len(arguments) != 2:
        return ()
    labelled = [argument for argument in arguments if channels.labels.get(argument) is not None]
    if len(labelled) != 1:
        return ()
    values = labelled[0]
    weights = arguments[1] if values is arguments[0] else arguments[0]
    while operation(weights) not in PRODUCTS_OF_MATRICES:  # back over softmax, scale and bias
        read = channels.inputs(weights)
        if not read or channels.kinds[weights] is Kind.WEIGHTED:
            return ()
        weights = read[0]
    compared = [
        argument for argument in weights.args
        if isinstance(argument, fx.Node) and channels.labels.get(argument) is not None
    ]  # fmt: skip
    return (values, *compared) if len(compared) == 2 else ()


def _matrices(channels: Channels, node: fx.Node) -> list[np.ndarray] | None:
    """The labels of each matrix of a batch of matrices, those of one image; None where two have a channel in common."""
    labels = channels.labels[node]
    if labels is None or len(labels.shape) < 3:
        return None
    unique = [np.unique(matrix.long().numpy()) for matrix in labels.full.flatten(0, -3)]
    matrices = list({row.tobytes(): row for row in unique}.values())
    together = np.concatenate(matrices)
    return matrices if len(np.unique(together)) == len(together) else None
