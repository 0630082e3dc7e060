"""The prunable neurons of any network whose forward can be recorded.

A neuron is an output channel of a convolution with its normalisation, a hidden unit of a linear layer, or a head of an
attention. Pruning it makes that channel, or all channels of the head, zero. Which layers have neurons:

- *Batch normalisation*, and group and instance normalisation: the neuron is a channel of the normalisation. Where it reads a
  single convolution, and nothing else reads that, the neuron bears the convolution's name (``layer3.0.conv1[57]``); where it
  reads a residual sum or a concatenation, its own (``layer3.1.bn1[57]``).
- *Layer normalisation* with a weight for each channel: the same, but only where it reads a single layer that nothing else reads.
- *Attention* whose heads can be told apart: the neuron is a head, with its queries, keys and values (``blocks.3.attn.qkv[2]``).
- Any other convolution or linear layer has neurons of its own, unless the logits come from it.

A layer that is used several times in one pass is one layer of neurons, masked at each use. ``Neurons.accounts`` says of every
layer with weights how many of its channels belong to a neuron, and why others do not.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import UntraceableError
from ..networks.preprocessing import own_module
from .accounts import accounts, notes, why_none
from .channel_origin import Source, classes, sources
from .channels import Channels, Kind, mask_channels
from .copying import computed_weights
from .layers import Feeder, NeuronLayer, Neurons, Part
from .sites import Site, Sites
from .tracing import trace


def find_neurons(network: nn.Module, images: Tensor | None = None) -> Neurons:
    """Trace a network and find its neurons; the network itself is left as it is.

    Args:
        network: module from images (n, C, H, W) to logits.
        images: some that it takes, float32 (n, C, H, W); without any, images of usual sizes are tried.

    Raises:
        UntraceableError: the network cannot be traced, or has no neuron; the message says why.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from backdoor_gym.neurons.finding import find_neurons
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> find_neurons(network, torch.rand(1, 3, 8, 8)).names
        ['0[0]', '0[1]', '0[2]', '0[3]']
    """
    graph_module = trace(network, images)
    sites = Sites(Channels(graph_module), network)
    told = accounts(sites)
    if not sites.by_layer:
        raise UntraceableError(f"{type(own_module(network)).__name__} has no prunable neuron: {why_none(told)}")
    layers, sentences = _LayerMaker(sites).make(), notes(sites)
    computed = [sites.shown(name) for name in computed_weights(network)]
    if computed:
        sentences.append(
            f"The weights of {computed[0]}{f' and {len(computed) - 1} more layers' if computed[1:] else ''} are computed by a "
            "normalisation of weights or another parametrisation; in the repaired network they are plain, as after "
            "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm."
        )
    computes_in = graph_module.meta["computes_in"]
    if computes_in:
        sentences.append(
            f"Its forward computes in {' and '.join(computes_in)}, by casts or autocast; masks are computed in float32, so that "
            "its own answers differ from theirs by rounding."
        )
    _insert_masks(sites, layers)
    graph_module.to(next((parameter.device for parameter in network.parameters()), torch.device("cpu")))
    return Neurons(tuple(layers), graph_module, told, tuple(sentences))


class _LayerMaker:
    """Makes neuron layers from their sites."""

    def __init__(self, sites: Sites) -> None:
        self._sites, self._channels = sites, sites.channels
        self._index_of = {site.node: index for index, group in enumerate(sites.by_layer) for site in group}
        self._classes = classes(sites.channels)

    def make(self) -> list[NeuronLayer]:
        layers: list[NeuronLayer] = []
        for sites in self._sites.by_layer:
            layers.append(self._layer(sites, layers[-1].neurons.stop if layers else 0))
        return layers

    def _layer(self, sites: Sequence[Site], start: int) -> NeuronLayer:
        channels, node = self._channels, sites[0].node
        size = 1 + max(int(site.units.max()) for site in sites)
        heads_classes = channels.count + start + np.arange(size)  # heads share no sum
        feeders: dict[str, Feeder] = {}
        parts: dict[tuple, Part] = {}
        for site in sites:
            for source in site.feeders:
                feeders.setdefault(str(source.node.target), self._feeder(source, site))
            layer = channels.lowered[str(site.node.target)]
            weights, biases = layer.weight or (), layer.bias or ()
            parts.setdefault((weights, biases), Part(str(site.node.target), weights, biases, site.units))
        return NeuronLayer(
            name=self._sites.name(self._sites.bears_name_of(sites)),
            parts=tuple(parts.values()),
            normalised=channels.kinds[node] is Kind.NORM,
            node=node.name,
            size=size,
            start=start,
            feeders=tuple(feeders.values()),
            classes=heads_classes if sites[0].of_heads else self._classes[channels.made(node)],
            axis=channels.axis(node),
        )

    def _feeder(self, source: Source, site: Site) -> Feeder:
        """A layer that feeds a site, with the neurons it reads at any of its uses."""
        channels = self._channels
        rows = np.full(channels.size(source.node), -1)
        places = np.flatnonzero(source.channels >= 0)
        rows[source.channels[places]] = site.units[places]
        upstream: dict[int, np.ndarray] = {}
        for use in channels.uses(source.node):
            for read in sources(channels, channels.read(use), self._index_of.keys()):
                index = self._index_of.get(read.node)
                if index is not None and index != self._index_of[site.node]:
                    units = self._sites.at[read.node].units
                    upstream.setdefault(index, np.where(read.channels >= 0, units[read.channels], -1))
        return Feeder(
            module=str(source.node.target),
            norms=tuple(str(norm.target) for norm in source.norms),
            rows=rows,
            upstream=tuple(upstream),
            columns=tuple(upstream.values()),
            scale=self._scale(source.node),
        )

    def _scale(self, node: fx.Node) -> str | None:
        """The normalisation without neurons that a layer reads directly."""
        channels = self._channels
        node = channels.inputs(node)[0]
        while channels.kinds[node] is Kind.ZERO_PRESERVING:
            node = channels.inputs(node)[0]
        is_norm = channels.kinds[node] is Kind.LIVE_NORM and node.op == "call_module"
        return str(node.target) if is_norm and node not in self._index_of else None


def _insert_masks(sites: Sites, layers: Sequence[NeuronLayer]) -> None:
    """Give the graph one more input a layer, and multiply the layer's values by it wherever it is used."""
    graph_module = sites.channels.graph_module
    graph = graph_module.graph
    last_input = next(node for node in graph.nodes if node.op == "placeholder")
    for index, (group, layer) in enumerate(zip(sites.by_layer, layers, strict=True)):
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(f"neuron_mask_{index}", default_value=None)
        last_input.meta["size"] = layer.size
        for place, site in enumerate(group):
            arguments: tuple = (site.node, last_input, sites.channels.axis(site.node))
            if site.of_heads:
                name = f"_units_{index}_{place}"
                graph_module.register_buffer(name, torch.from_numpy(site.units), persistent=False)
                with graph.inserting_before(site.node):
                    arguments = (*arguments, graph.get_attr(name))
            with graph.inserting_after(site.node):
                masked = graph.call_function(mask_channels, arguments)
            masked.meta["shape"] = site.node.meta["shape"]
            for reader in list(site.node.users):
                if reader is not masked:
                    reader.replace_input_with(site.node, masked)
    graph_module.recompile()
