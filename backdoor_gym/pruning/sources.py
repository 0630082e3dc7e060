"""Where the channels of a value come from, and which values have the same channels."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from .channels import ATTENTION, CHANNELWISE, Channels, Kind, module_of

#: What only moves values elsewhere, or cuts them in pieces.
MOVES = {
    operator.getitem, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split, torch.unbind,
    "flatten", "view", "reshape", "permute", "transpose", "chunk", "split", "unbind", "unflatten", "contiguous", "unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A layer that writes into a value, or a value met on the way to one.

    Attributes:
        node: of the graph.
        norms: the normalisations passed on the way, the last one first.
        offset: the channel of the value that its first channel becomes.
    """

    node: fx.Node
    norms: tuple[fx.Node, ...]
    offset: int


def sources(
    channels: Channels, start: fx.Node, stop: set[fx.Node] | frozenset[fx.Node] = frozenset()
) -> Iterator[Source]:
    """Walk back from a value to where its channels come from, the nearest first.

    Args:
        channels: of the graph.
        start: the node whose value is asked about.
        stop: nodes to yield and not to pass, beside weighted layers.

    Yields:
        Each weighted or ``stop`` node reached, once; what lies behind an operation that mixes channels is not.
    """
    front = [Source(start, (), 0)]
    seen = set()
    while front:
        one = front.pop(0)
        node, kind = one.node, channels.kinds[one.node]
        if node in seen:
            continue
        seen.add(node)
        if node in stop or kind is Kind.WEIGHTED:
            yield one
        elif kind is Kind.CONCATENATION:
            front.extend(
                Source(piece, one.norms, one.offset + begin)
                for piece, begin in channels.pieces(node)
                if begin is not None
            )
        elif kind in CHANNELWISE:
            passed = (*one.norms, node) if kind in (Kind.NORM, Kind.LIVE_NORM) else one.norms
            front.extend(Source(source, passed, one.offset) for source in channels.carriers(node))


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


def projections(channels: Channels) -> set[fx.Node]:
    """The layers whose values attention reads as they are: queries, keys and values."""
    return {node for node in channels.nodes if channels.kinds[node] is Kind.WEIGHTED and _is_attended(channels, node)}


def _is_attended(channels: Channels, start: fx.Node) -> bool:
    front, seen = [start], set()
    while front:
        node = front.pop()
        for user in node.users:
            module = module_of(channels.graph_module, user)
            if isinstance(module, nn.MultiheadAttention) or (module is None and user.target in ATTENTION):
                return True
            scaled = user.target in (operator.mul, operator.truediv) and len(channels.inputs(user)) == 1
            if module is None and (user.target in MOVES or scaled) and user not in seen:
                seen.add(user)
                front.append(user)
    return False


def gates(channels: Channels) -> set[fx.Node]:
    """The layers that only say how much of other channels passes, such as the last one of squeeze-and-excitation."""
    found = set()
    for node in channels.nodes:
        if channels.kinds[node] is Kind.PRODUCT:
            carriers = channels.carriers(node)
            carried = {one.node for source in carriers for one in sources(channels, source)}
            gated = [source for source in channels.inputs(node) if source not in carriers]
            found |= {one.node for source in gated for one in sources(channels, source)} - carried
    return found


class Spaces:
    """Values that have the same channels, because operations on them join these one by one, are of one space.

    Args:
        channels: of the graph.
        joining: kinds of the nodes that join their inputs' channels with their own, beside concatenations.
        depthwise: whether a depthwise convolution joins its inputs' channels with its own too.
    """

    def __init__(self, channels: Channels, joining: frozenset[Kind] = CHANNELWISE, depthwise: bool = False) -> None:
        self._parent = {node: (node, 0) for node in channels.nodes}
        #: Spaces of which some value has the same channels twice, at different places.
        self.twisted: set[fx.Node] = set()
        for node in channels.nodes:
            kind = channels.kinds[node]
            if kind is Kind.CONCATENATION:
                for piece, begin in channels.pieces(node):
                    if begin is not None:
                        self._join(piece, node, begin)
            elif kind in joining or (depthwise and kind is Kind.WEIGHTED and is_depthwise(channels, node)):
                for source in channels.inputs(node):
                    if channels.kinds[source] is not Kind.IMAGES:
                        self._join(source, node, 0)
        self.twisted = {self.of(node)[0] for node in self.twisted}

    def of(self, node: fx.Node) -> tuple[fx.Node, int]:
        """The space of a value, named by one of its nodes, and the channel of it that the value's first one is."""
        shift = 0
        while self._parent[node][0] is not node:
            node, step = self._parent[node]
            shift += step
        return node, shift

    def _join(self, source: fx.Node, node: fx.Node, begin: int) -> None:
        """Let channel c of ``source`` be channel c + ``begin`` of ``node``."""
        (top, shift), (other, other_shift) = self.of(source), self.of(node)
        by = begin + other_shift - shift
        if top is not other:
            self._parent[top] = (other, by)
        elif by:
            self.twisted.add(top)


def is_depthwise(channels: Channels, node: fx.Node) -> bool:
    """Whether the node is a convolution each of whose outputs reads the one input of the same number."""
    module = channels.graph_module.get_submodule(str(node.target))
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0)
