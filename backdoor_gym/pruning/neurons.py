"""The prunable neurons of any network that torch.fx can trace.

A neuron is an output channel of a convolution with its normalisation, or a hidden unit of a linear layer. Pruning it
makes that channel zero. Which layers have neurons:

- *Batch normalisation* (group and instance normalisation alike): where it reads exactly one convolution that nothing else
  reads, the neuron is named after the convolution (``layer3.0.conv1[57]``); where it reads a residual sum or a
  concatenation, the neuron is that channel of the normalisation (``layer3.1.bn1[57]``).
- *Layer normalisation* that reads exactly one layer which nothing else reads: likewise, as its weight and bias are of one
  channel each. What writes into a sum that a layer normalisation reads (the residual stream of a transformer) is no neuron:
  its channels are coordinates that all later blocks share, and zeros there change the statistics of all others.
- Any other convolution or linear layer has neurons of its own, but those that the logits come from, those whose values
  attention compares or averages as they are (queries, keys, values), and those that only gate other channels.

A layer that is used several times in one pass is one layer of neurons, masked at each use.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import UnknownNameError, UntraceableError
from ..zoo.preprocessing import Preprocessed
from .channels import WEIGHTED, Channels, Kind, mask_channels, module_of
from .sources import Source, Spaces, gates, last_layers, projections, sources
from .tracing import trace

RESIDUAL_MODES = ("channel", "group")


@dataclass(frozen=True)
class Feeder:
    """A convolution or linear layer that writes into what a neuron layer reads."""

    module: str
    #: Normalisations between it and the neuron layer's own.
    norms: tuple[str, ...]
    #: Indices of the neuron layers whose (masked) channels it reads, nearest first.
    upstream: tuple[int, ...]
    #: For each of these, the channel read that its first one is: not 0 where channels were concatenated.
    offsets: tuple[int, ...]
    #: How many channels it reads; a linear layer behind a flattened image has several inputs for each.
    reads: int
    #: The neuron of the layer that its first channel is: not 0 where channels were concatenated.
    start: int = 0
    #: Normalisation that it reads directly and that has no neurons itself, None for none.
    scale: str | None = None


@dataclass(frozen=True)
class NeuronLayer:
    """The neurons of one layer."""

    name: str
    #: Module whose weights hold the mask: a normalisation, or the convolution or linear layer itself.
    module: str
    #: Whether that module is a batch normalisation.
    normalised: bool
    #: Name of the node of the traced graph whose value is masked; of a layer that is used several times the first one.
    node: str
    size: int
    #: Index of the first neuron of the layer.
    start: int
    feeders: tuple[Feeder, ...]
    #: Layers of the same number share channels through residual sums,
    space: int
    #: of which the first one of this layer is that of this number.
    shift: int = 0
    #: Where the channels are in the node's value: 1, or -1 for the last axis.
    axis: int = 1

    @property
    def neurons(self) -> slice:
        """The neurons of this layer among all."""
        return slice(self.start, self.start + self.size)


class Neurons:
    """The prunable neurons of a network, in network order.

    Attributes:
        layers: the neuron layers.
        graph: a traced copy of the network, without in-place operations, that takes the images and one mask a layer
            (float (size,), or None for nothing pruned).
    """

    def __init__(self, layers: Sequence[NeuronLayer], graph: fx.GraphModule) -> None:
        self.layers = tuple(layers)
        self.graph = graph

    def __len__(self) -> int:
        return sum(layer.size for layer in self.layers)

    @cached_property
    def names(self) -> list[str]:
        """The name of each neuron, such as ``layer3.0.conv1[57]``."""
        return [f"{layer.name}[{channel}]" for layer in self.layers for channel in range(layer.size)]

    @cached_property
    def layer_index(self) -> np.ndarray:
        """The index of the layer of each neuron, int64 (neurons,)."""
        return np.repeat(np.arange(len(self.layers)), [layer.size for layer in self.layers])

    def index(self, name: str) -> int:
        """The neuron of that name.

        Raises:
            UnknownNameError: no such neuron.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownNameError("neuron", name, self.names) from None

    def units(self, residual: str = "channel") -> list[np.ndarray]:
        """What is pruned at a time: each neuron alone ("channel"), or with those it shares a residual sum with ("group").

        Raises:
            UnknownNameError: neither of the two.
        """
        if residual not in RESIDUAL_MODES:
            raise UnknownNameError("residual mode", residual, RESIDUAL_MODES)
        if residual == "channel":
            return [np.array([neuron]) for neuron in range(len(self))]
        units: dict[tuple[int, int], list[int]] = {}
        for layer in self.layers:
            for channel in range(layer.size):
                units.setdefault((layer.space, layer.shift + channel), []).append(layer.start + channel)
        return [np.array(members) for members in units.values()]

    def layer_masks(self, mask: np.ndarray, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """A mask of all neurons, bool (neurons,), True where kept, as one mask a layer for ``graph``."""
        parts = (mask[layer.neurons] for layer in self.layers)
        return [None if part.all() else torch.from_numpy(part.astype(np.float32)).to(device) for part in parts]


def find_neurons(network: nn.Module, images: Tensor | None = None) -> Neurons:
    """Trace a network and find its neurons; the network itself is left as it is.

    Args:
        network: module from images (n, C, H, W) to logits.
        images: some that it takes, float32 (n, C, H, W); only needed where its forward branches on the shapes of tensors.

    Raises:
        UntraceableError: the network cannot be traced, or a layer of it cannot be handled; the message names it.
    """
    graph_module = trace(network, images)
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise UntraceableError(f"{type(network).__name__}.forward must take images alone, not {len(inputs)} arguments")
    channels = Channels(graph_module)
    feeders = _find_sites(channels)
    sites = [node for node in channels.nodes if node in feeders]
    if not sites:
        raise UntraceableError(
            f"{type(network).__name__} has no prunable neuron: no convolution or linear layer before its last one"
        )
    uses = _gather_uses(channels, sites)
    _refuse_tied(network, [str(nodes[0].target) for nodes in uses])
    index_of = {node: index for index, nodes in enumerate(uses) for node in nodes}
    spaces, numbers = Spaces(channels), dict[fx.Node, int]()
    called = Counter(node.target for node in channels.nodes if node.op == "call_module")
    layers: list[NeuronLayer] = []
    in_front = (
        Preprocessed.PREFIX if isinstance(network, Preprocessed) else ""
    )  # names are those of the network behind it
    for index, nodes in enumerate(uses):
        site, found = nodes[0], feeders[nodes[0]]
        space, shift = spaces.of(site)
        layers.append(
            NeuronLayer(
                name=str((found[0].node if _is_alone(site, found, called) else site).target).removeprefix(in_front),
                module=str(site.target),
                normalised=channels.kinds[site] is Kind.NORM,
                node=site.name,
                size=_size(channels, site),
                start=layers[-1].start + layers[-1].size if layers else 0,
                feeders=tuple(_feeder(channels, one, index_of, index) for one in found),
                space=numbers.setdefault(space, len(numbers)),
                shift=shift,
                axis=_axis(channels, site),
            )
        )
    _insert_masks(channels, uses, layers)
    return Neurons(layers, graph_module)


def _find_sites(channels: Channels) -> dict[fx.Node, list[Source]]:
    """The nodes whose values are masked, with the layers that write into what each of them reads."""
    last = last_layers(channels)
    feeders: dict[fx.Node, list[Source]] = {}
    written: set[fx.Node] = set()
    for node in channels.nodes:
        if channels.kinds[node] not in (Kind.NORM, Kind.LIVE_NORM):
            continue
        found = list(sources(channels, channels.inputs(node)[0]))
        if all(one.node in last for one in found):
            continue
        norm = module_of(channels.graph_module, node)
        assert norm is not None
        if channels.kinds[node] is Kind.NORM:
            _check_norm(node, norm)
        elif norm.weight is None:  # nothing to write zeros into
            continue
        if isinstance(norm, nn.LayerNorm) and not _reads_alone(node, found):
            written |= {one.node for one in found}
            continue
        feeders[node] = found
        written |= {one.node for one in found}
    left_out = last | written | projections(channels) | gates(channels)
    for node in channels.nodes:
        if channels.kinds[node] is Kind.WEIGHTED and node not in left_out:
            feeders[node] = [Source(node, (), 0)]
    return feeders


def _reads_alone(norm: fx.Node, found: Sequence[Source]) -> bool:
    """Whether a normalisation reads one layer, and alone."""
    if len(found) != 1 or found[0].norms:
        return False
    node = found[0].node
    while node is not norm:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return True


def _is_alone(site: fx.Node, found: Sequence[Source], called: Counter) -> bool:
    """Whether the neurons of a site are those of one convolution or linear layer, whose name they bear."""
    if len(found) != 1 or found[0].norms:
        return False
    node = found[0].node
    return node is site or (len(node.users) == 1 and called[node.target] == 1)


def _gather_uses(channels: Channels, sites: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The sites by layer, in network order: a layer without normalisation may be used several times."""
    by_layer: dict[str, list[fx.Node]] = {}
    for node in sites:
        by_layer.setdefault(str(node.target), []).append(node)
    for name, nodes in by_layer.items():
        calls = sum(node.op == "call_module" and node.target == name for node in channels.nodes)
        weighted = channels.kinds[nodes[0]] is Kind.WEIGHTED
        if calls > 1 and not (weighted and len(nodes) == calls):
            raise UntraceableError(f"layer {name} is used twice in one pass; give each use a layer of its own")
    return list(by_layer.values())


def _refuse_tied(network: nn.Module, names: Sequence[str]) -> None:
    """Zeros written into a weight that two layers share would prune the other one too."""
    owners: dict[int, list[str]] = {}
    for name, module in network.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name in names:
        for parameter in network.get_submodule(name)._parameters.values():
            others = [other for other in owners.get(id(parameter), ()) if other != name]
            if parameter is not None and others:
                raise UntraceableError(
                    f"layer {name} shares its weights with layer {others[0]}; give each of them weights of its own (a copy)"
                )


def _check_norm(node: fx.Node, norm: nn.Module) -> None:
    if norm.weight is None or norm.running_var is None:
        raise UntraceableError(
            f"the batch normalisation {node.target} needs affine=True and track_running_stats=True to be pruned"
        )


def _size(channels: Channels, node: fx.Node) -> int:
    weight = channels.graph_module.get_submodule(str(node.target)).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _axis(channels: Channels, node: fx.Node) -> int:
    module = module_of(channels.graph_module, node)
    layout = channels.layouts[node]
    last = isinstance(module, nn.Linear) or (isinstance(module, nn.LayerNorm) and (layout is None or layout.is_last))
    return -1 if last else 1


def _feeder(channels: Channels, one: Source, index_of: dict[fx.Node, int], own: int) -> Feeder:
    """A layer that feeds a site, with the neurons it reads at any of its uses."""
    name = str(one.node.target)
    uses = [node for node in channels.nodes if node.op == "call_module" and node.target == one.node.target]
    upstream: dict[int, int] = {}
    for use in uses:
        for source in sources(channels, channels.inputs(use)[0], set(index_of)):
            index = index_of.get(source.node)
            if index is not None and index != own:
                upstream.setdefault(index, source.offset)
    read = channels.layouts[channels.inputs(one.node)[0]]
    module = channels.graph_module.get_submodule(name)
    assert isinstance(module, WEIGHTED)
    inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    return Feeder(
        module=name,
        norms=tuple(str(norm.target) for norm in one.norms),
        upstream=tuple(upstream),
        offsets=tuple(upstream.values()),
        reads=inputs if read is None or read.size is None else read.size,
        start=one.offset,
        scale=_scale(channels, one.node, index_of),
    )


def _scale(channels: Channels, node: fx.Node, index_of: dict[fx.Node, int]) -> str | None:
    """The normalisation without neurons that a layer reads directly."""
    node = channels.inputs(node)[0]
    while channels.kinds[node] is Kind.ZERO_PRESERVING:
        node = channels.inputs(node)[0]
    return str(node.target) if channels.kinds[node] is Kind.LIVE_NORM and node not in index_of else None


def _insert_masks(channels: Channels, uses: Sequence[Sequence[fx.Node]], layers: Sequence[NeuronLayer]) -> None:
    """Give the graph one more input a layer, and multiply the layer's value by it wherever it is used."""
    graph = channels.graph_module.graph
    for unused in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        graph.erase_node(unused)
    last_input = next(node for node in graph.nodes if node.op == "placeholder")
    for index, (sites, layer) in enumerate(zip(uses, layers, strict=True)):
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(f"neuron_mask_{index}", default_value=None)
        for site in sites:
            with graph.inserting_after(site):
                masked = graph.call_function(mask_channels, (site, last_input, layer.axis))
            for reader in list(site.users):
                if reader is not masked:
                    reader.replace_input_with(site, masked)
    channels.graph_module.recompile()
