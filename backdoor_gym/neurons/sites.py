"""Where a network can be masked: which values, by which weights, and why not elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from ..networks.preprocessing import own_name
from .channel_origin import Source, heads, last_layers, sources
from .channels import Channels, Kind, module_of

USED_OTHERWISE = "it is used several times in one pass, and not alike; give each use a layer of its own"


@dataclass(frozen=True, eq=False)
class Site:
    """A node whose value is masked.

    Attributes:
        node: a normalisation, a convolution or a linear layer.
        feeders: the layers that write into it.
        units: the neuron of the layer that each channel is of, -1 for none; int64 (channels,).
        of_heads: whether neurons are heads of an attention, of several channels each.
    """

    node: fx.Node
    feeders: tuple[Source, ...]
    units: np.ndarray
    of_heads: bool = False


class Sites:
    """The sites of a network.

    Args:
        channels: of the traced network.
        network: that it was traced from.

    Attributes:
        by_layer: of each neuron layer, in network order; several where a layer is used several times, or for heads.
        at: by node.
        last: the layers and other products with weights that the logits come from.
        reasons: why a layer or normalisation has no site.
        normalised_by: the normalisation that each convolution or linear layer is masked at.
    """

    def __init__(self, channels: Channels, network: nn.Module) -> None:
        self.channels = channels
        self.last = last_layers(channels)
        self.reasons: dict[fx.Node, str] = {}
        self.normalised_by: dict[fx.Node, fx.Node] = {}
        self._network = network
        #: The layers of the graph that read each parameter, and the parameters that something else reads as well.
        self._readers: dict[str, set[str]] = {}
        self._read_beside: set[str] = set()
        #: Layers with weights, and nodes that they stand before.
        self._behind_layers: set[fx.Node] = set()
        for node in channels.nodes:
            layer = channels.layer(node)
            has_weights = channels.kinds[node] in (Kind.WEIGHTED, Kind.OPAQUE)
            if has_weights or not self._behind_layers.isdisjoint(node.all_input_nodes):
                self._behind_layers.add(node)
            if layer is not None:
                for name in layer.tensors:
                    self._readers.setdefault(name, set()).add(str(node.target))
            elif node.op == "get_attr":
                self._read_beside.update(node.meta["read"])
        self.by_layer = self._find()
        self.at = {site.node: site for sites in self.by_layer for site in sites}

    def _find(self) -> list[list[Site]]:
        channels = self.channels
        sites: list[Site] = []
        for node in channels.nodes:
            site = self._norm_site(node) if channels.kinds[node] in (Kind.NORM, Kind.LIVE_NORM) else None
            if site is not None:
                sites.append(site)
                self.normalised_by.update(dict.fromkeys((feeder.node for feeder in site.feeders), node))
        attentions = self._attentions()
        taken = self.last.union(self.normalised_by, *attentions)
        for node in channels.nodes:
            if channels.kinds[node] is Kind.WEIGHTED and node not in taken and self._can_be_written(node):
                sites.append(_own_site(node, np.arange(channels.size(node))))
        layers = self._by_layer(sites)
        layers += [[_own_site(*head, of_heads=True) for head in attention.items()] for attention in attentions]
        order = {node: place for place, node in enumerate(channels.nodes)}
        return sorted(layers, key=lambda group: order[group[0].node])

    def name(self, node: fx.Node) -> str:
        """What the user calls a layer."""
        layer = self.channels.layer(node)
        return self.shown(str(node.target) if layer is None else layer.name)

    def shown(self, name: str) -> str:
        """What the user calls a layer or parameter of the graph."""
        return own_name(self._network, name)

    def bears_name_of(self, sites: Sequence[Site]) -> fx.Node:
        """The node whose name the neurons of a layer bear: that of a convolution which one normalisation alone reads."""
        node, feeders = sites[0].node, sites[0].feeders
        alone = len(sites) == 1 and self._reads_alone(node, feeders) and len(self.channels.uses(feeders[0].node)) == 1
        return feeders[0].node if alone else node

    def _norm_site(self, node: fx.Node) -> Site | None:
        channels, module = self.channels, module_of(self.channels.graph_module, node)
        if module is None or module.weight is None or channels.labels[node] is None or node not in self._behind_layers:
            return None
        made, feeders = channels.made(node), tuple(sources(channels, channels.read(node)))
        has_own_channels = channels.block(int(made[0])).node is node
        is_output = bool(feeders) and all(feeder.node in self.last for feeder in feeders)
        if is_output or not has_own_channels:
            return None
        if isinstance(module, nn.LayerNorm) and not self._reads_alone(node, feeders):
            return None
        return Site(node, feeders, np.arange(len(made))) if self._can_be_written(node) else None

    def _can_be_written(self, node: fx.Node) -> bool:
        """Whether zeros in rows of its parameters are zeros in its channels, and change nothing else."""
        layer = self.channels.lowered[str(node.target)]
        if not layer.tensors:
            self.reasons[node] = "its weights are constants of the network's code"
        elif not layer.writable:
            self.reasons[node] = "its weights are computed from others in a way that no zeros can be written into"
        else:
            written = {name for name, _ in (*(layer.weight or ()), *(layer.bias or ()))}
            readers = {reader for name in written for reader in self._readers[name]}
            others = sorted(name for name in readers if self.channels.lowered[name].weight != layer.weight)
            if written - self.channels.graph_module.meta["saved"]:
                self.reasons[node] = (
                    "its weights are no part of the state dict (persistent=False), and zeros would be lost"
                )
                return False
            if not written & self._read_beside and not others:
                return True
            readers_in_words = sorted(
                {self.shown(self.channels.lowered[name].name) for name in others} - {self.name(node)}
            )
            what = f"layer {readers_in_words[0]}" if readers_in_words else "another operation"
            self.reasons[node] = f"{what} reads its weights too"
        return False

    def _reads_alone(self, norm: fx.Node, feeders: Sequence[Source]) -> bool:
        """Whether a normalisation reads a single layer, and nothing else reads that."""
        if len(feeders) != 1 or feeders[0].norms:
            return False
        node = feeders[0].node
        while node is not norm:
            if len(node.users) != 1:
                return False
            node = next(iter(node.users))
        return True

    def _attentions(self) -> list[dict[fx.Node, np.ndarray]]:
        """The attentions whose heads are neurons: those whose layers serve nothing else."""
        attentions: list[dict[fx.Node, np.ndarray]] = []
        taken = self.last.union(self.normalised_by)
        for attention in heads(self.channels):
            if all(
                node not in taken and len(self.channels.uses(node)) == 1 and self._can_be_written(node)
                for node in attention
            ):
                attentions.append(attention)
                taken.update(attention)
        return attentions

    def _by_layer(self, sites: Sequence[Site]) -> list[list[Site]]:
        """The sites of each layer; one that is used several times must be masked at each use."""
        masked = {site.node: site for site in sites}
        layers = []
        for node, site in masked.items():
            uses = self.channels.uses(node)
            if all(use in masked for use in uses):
                if node is uses[0]:
                    layers.append([masked[use] for use in uses])
                continue
            self.reasons[node] = USED_OTHERWISE
            for source in site.feeders:
                if self.normalised_by.get(source.node) is node:
                    self.reasons[source.node] = f"it is normalised by {self.name(node)}, which is used several times"
        return layers


def _own_site(node: fx.Node, units: np.ndarray, of_heads: bool = False) -> Site:
    """A layer that is masked itself."""
    return Site(node, (Source(node, (), np.arange(len(units))),), units, of_heads)
