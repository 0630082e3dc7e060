"""The prunable neurons of any network whose forward can be recorded.

A neuron is an output channel of a convolution with its normalisation, a hidden unit of a linear layer, or a head of an
attention. Pruning it makes that channel, or all channels of the head, zero. Which layers have neurons:

- *Batch normalisation* (group and instance normalisation alike): where it reads exactly one convolution that nothing else
  reads, the neuron is named after the convolution (``layer3.0.conv1[57]``); where it reads a residual sum or a
  concatenation, the neuron is that channel of the normalisation (``layer3.1.bn1[57]``).
- *Layer normalisation* that reads exactly one layer which nothing else reads: likewise, as its weight and bias are of one
  channel each.
- *Attention* whose heads can be told apart: a neuron is a head, with its queries, keys and values (``blocks.3.attn.qkv[2]``).
- Any other convolution or linear layer has neurons of its own, but those that the logits come from.

A layer that is used several times in one pass is one layer of neurons, masked at each use. ``accounts`` says of every layer with
weights how many of its channels belong to a neuron, and why others do not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import UnknownNameError, UntraceableError, check_name
from ..networks.preprocessing import Preprocessed, own_module
from .channel_origin import Source, classes, heads, last_layers, sources
from .channels import PRODUCTS_OF_MATRICES, Channels, Kind, mask_channels, module_of, operation
from .copying import computed_weights, plain_copy
from .lowering import Lowered
from .tracing import trace

RESIDUAL_MODES = ("channel", "group")


@dataclass(frozen=True, eq=False)
class Feeder:
    """A convolution or linear layer that writes into what a neuron layer reads.

    Attributes:
        module: its name in the graph.
        norms: normalisations between it and the neuron layer's own.
        rows: the neuron of the layer that each of its output channels is, -1 for none; int64 (channels,).
        upstream: indices of the neuron layers whose (masked) channels it reads, nearest first.
        columns: for each of these, its neuron that each input is of, -1 for none; int64 (inputs,). A linear layer behind a
            flattened image has several inputs for each.
        scale: normalisation that it reads directly and that has no neurons itself, None for none.
    """

    module: str
    norms: tuple[str, ...]
    rows: np.ndarray
    upstream: tuple[int, ...]
    columns: tuple[np.ndarray, ...]
    scale: str | None = None

    def of_rows(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The neuron of each output channel that is of one, int64, and what that channel has in ``values`` (channels, ...)."""
        rows = torch.from_numpy(self.rows)
        return rows[rows >= 0], values[rows >= 0]


@dataclass(frozen=True, eq=False)
class Part:
    """A layer whose weights hold the mask.

    Attributes:
        module: its name in the graph.
        weights: the parameters of the network in whose rows zeros are written, each with the first row that it makes; one as a
            rule.
        biases: likewise, empty where there is none.
        units: the neuron that each row is of, -1 for none, int64 (rows,); None where row and neuron have the same number.
    """

    module: str
    weights: tuple[tuple[str, int], ...]
    biases: tuple[tuple[str, int], ...]
    units: np.ndarray | None = None

    def rows(self, pruned: np.ndarray) -> np.ndarray:
        """The rows of some neurons, bool (neurons,) to bool (rows,)."""
        return pruned if self.units is None else (self.units >= 0) & pruned[np.maximum(self.units, 0)]

    def by_neuron(self, values: Tensor, count: int) -> Tensor:
        """Of each neuron the mean of what its rows have, (rows,) to (neurons,)."""
        if self.units is None:
            return values
        units = torch.from_numpy(self.units).to(values.device)
        inside = units >= 0
        sums, sizes = (
            values.new_zeros(count).index_add(0, units[inside], one[inside])
            for one in (values, torch.ones_like(values))
        )
        return sums / sizes.clamp(min=1)

    def by_row(self, values: Tensor, rest: float) -> Tensor:
        """Of each row what its neuron has, (neurons,) to (rows,); ``rest`` for rows of none."""
        if self.units is None:
            return values
        units = torch.from_numpy(self.units).to(values.device)
        return torch.where(units >= 0, values[units], torch.full((), rest, dtype=values.dtype, device=values.device))


@dataclass(frozen=True, eq=False)
class NeuronLayer:
    """The neurons of one layer."""

    name: str
    #: The layers whose weights hold the mask: a normalisation, or the convolution or linear layer itself; several for heads.
    parts: tuple[Part, ...]
    #: Whether that is a batch normalisation.
    normalised: bool
    #: Name of the node of the traced graph whose value is masked; of several the first one.
    node: str
    size: int
    #: Index of the first neuron of the layer.
    start: int
    feeders: tuple[Feeder, ...]
    #: The class of each neuron, int64 (size,): those of one class share a residual sum.
    classes: np.ndarray
    #: Where the channels are in the node's value: 1, or -1 for the last axis.
    axis: int = 1

    @property
    def module(self) -> str:
        """Name in the graph of the layer whose weights hold the mask; of several the first one."""
        return self.parts[0].module

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the parameters in whose rows zeros are written."""
        return tuple(name for part in self.parts for name, _ in part.weights)

    @property
    def biases(self) -> tuple[str, ...]:
        """The biases among them."""
        return tuple(name for part in self.parts for name, _ in part.biases)

    @property
    def neurons(self) -> slice:
        """The neurons of this layer among all."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Account:
    """What became of a layer with weights.

    Attributes:
        name: of the layer.
        channels: how many it gives.
        units: how many of these belong to a neuron.
        is_output: whether the logits come from it.
        reason: why not all of them do, None where they do.
    """

    name: str
    channels: int
    units: int
    is_output: bool = False
    reason: str | None = None


class Neurons:
    """The prunable neurons of a network, in network order.

    Attributes:
        layers: the neuron layers.
        graph: a traced copy of the network, without in-place operations, that takes the images and one mask a layer
            (float (size,), or None for nothing pruned).
        accounts: of every layer with weights.
        notes: what else is worth knowing, a sentence each: batch normalisations without neurons.
    """

    def __init__(
        self,
        layers: Sequence[NeuronLayer],
        graph: fx.GraphModule,
        accounts: Sequence[Account] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.layers = tuple(layers)
        self.graph = graph
        self.accounts = tuple(accounts)
        self.notes = tuple(notes)

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

    def layer_in(self, network: nn.Module, name: str) -> nn.Module:
        """A layer by its name in the graph: the network's own where it is one there, and that of the traced copy elsewhere."""
        lowered: Mapping[str, Lowered] = self.graph.meta["lowered"]
        return (network if lowered[name].is_plain else self.graph).get_submodule(name)

    @property
    def coverage(self) -> float:
        """Share of the channels of all layers with weights but the output that belong to a neuron."""
        inner = [account for account in self.accounts if not account.is_output]
        return sum(account.units for account in inner) / max(1, sum(account.channels for account in inner))

    @property
    def left_out(self) -> list[Account]:
        """The layers of which some channels belong to no neuron, without the output."""
        return [account for account in self.accounts if account.units < account.channels and not account.is_output]

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
        check_name("residual mode", residual, RESIDUAL_MODES)
        if residual == "channel":
            return [np.array([neuron]) for neuron in range(len(self))]
        units: dict[int, list[int]] = {}
        for layer in self.layers:
            for channel, number in enumerate(layer.classes.tolist()):
                units.setdefault(number, []).append(layer.start + channel)
        return [np.array(members) for members in units.values()]

    def layer_masks(self, mask: np.ndarray, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """A mask of all neurons, bool (neurons,), True where kept, as one mask a layer for ``graph``."""
        parts = (mask[layer.neurons] for layer in self.layers)
        return [None if part.all() else torch.from_numpy(part.astype(np.float32)).to(device) for part in parts]


def find_neurons(network: nn.Module, images: Tensor | None = None) -> Neurons:
    """Trace a network and find its neurons; the network itself is left as it is.

    Args:
        network: module from images (n, C, H, W) to logits.
        images: some that it takes, float32 (n, C, H, W); without any, images of usual sizes are tried.

    Raises:
        UntraceableError: the network cannot be traced, or has no neuron; the message says why.
    """
    graph_module = trace(network, images)
    computed = computed_weights(network)
    prefix = (
        Preprocessed.PREFIX if isinstance(network, Preprocessed) else ""
    )  # names are those of the network behind it
    neurons = _Finder(graph_module, type(own_module(network)).__name__, prefix).find()
    unused = _unused(network, graph_module)
    if unused:
        neurons.notes += (f"No pass uses the weights of {', '.join(unused[:5])}{', ...' if unused[5:] else ''}.",)
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    neurons.graph.to(device)
    if computed:
        neurons.notes += (
            f"The weights of {computed[0]}{f' and {len(computed) - 1} more layers' if computed[1:] else ''} are computed by a "
            "normalisation of weights or another parametrisation; in the repaired network they are plain, as after "
            "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm.",
        )
    return neurons


def _unused(network: nn.Module, graph_module: fx.GraphModule) -> list[str]:
    """The layers whose weights no pass reads."""
    read = {name for known in graph_module.meta["lowered"].values() for name in known.tensors}
    for node in graph_module.graph.nodes:
        read.update(node.meta.get("read", ()) if node.op == "get_attr" else ())
    weights = dict(plain_copy(network).named_parameters(remove_duplicate=False))
    return [name.removesuffix(".weight") for name, value in weights.items() if value.ndim > 1 and name not in read]


@dataclass(frozen=True, eq=False)
class _Site:
    """Nodes of one layer whose values are masked alike, and the layers that write into what they read."""

    node: fx.Node
    feeders: tuple[Source, ...]
    #: The neuron of each channel, None where they have the same number.
    units: np.ndarray | None = None


class _Finder:
    def __init__(self, graph_module: fx.GraphModule, network: str, prefix: str) -> None:
        self.channels = Channels(graph_module)
        self.network, self.prefix = network, prefix
        self.lowered: Mapping[str, Lowered] = graph_module.meta["lowered"]
        self.last = last_layers(self.channels)
        #: The layers of the graph that read each parameter, and the parameters that something else reads as well.
        self.readers: dict[str, set[str]] = {}
        self.outside: set[str] = set()
        for node in self.channels.nodes:
            if node.op == "call_module" and str(node.target) in self.lowered:
                for name in self.lowered[str(node.target)].tensors:
                    self.readers.setdefault(name, set()).add(str(node.target))
            elif node.op == "get_attr":
                self.outside.update(node.meta["read"])
        self.reasons: dict[fx.Node, str] = {}
        #: The normalisation that each convolution or linear layer is masked at.
        self.normalised_by: dict[fx.Node, fx.Node] = {}

    def find(self) -> Neurons:
        layers_of_sites = self._layers_of_sites()
        if not layers_of_sites:
            raise UntraceableError(f"{self.network} has no prunable neuron: {self._why_none()}")
        index_of = {site.node: index for index, sites in enumerate(layers_of_sites) for site in sites}
        units_of = {site.node: site.units for sites in layers_of_sites for site in sites}
        numbers = classes(self.channels)
        layers: list[NeuronLayer] = []
        for index, sites in enumerate(layers_of_sites):
            start = layers[-1].start + layers[-1].size if layers else 0
            layers.append(self._layer(sites, start, index, index_of, units_of, numbers))
        accounts = self._accounts(layers_of_sites)
        notes = self._notes(index_of)
        self._insert_masks(layers_of_sites, layers)
        return Neurons(layers, self.channels.graph_module, accounts, notes)

    def _why_none(self) -> str:
        said = list(dict.fromkeys(f"{self._name(node)} ({reason})" for node, reason in self.reasons.items()))
        weighted = [node for node in self.channels.nodes if self.channels.kinds[node] is Kind.WEIGHTED]
        if said:
            return f"of its layers none can be pruned: {'; '.join(said[:3])}"
        if weighted:
            return f"its only layer with weights, {self._name(weighted[0])}, gives the logits"
        return "it computes its logits without any convolution or linear layer whose weights are parameters"

    def _name(self, node: fx.Node) -> str:
        known = self.lowered.get(str(node.target))
        return (str(node.target) if known is None else known.name).removeprefix(self.prefix)

    def _layers_of_sites(self) -> list[list[_Site]]:
        """What is masked, layer by layer, in network order."""
        channels = self.channels
        sites: dict[fx.Node, _Site] = {}
        for node in channels.nodes:
            if channels.kinds[node] in (Kind.NORM, Kind.LIVE_NORM):
                site = self._norm_site(node)
                if site is not None:
                    sites[node] = site
                    self.normalised_by.update(dict.fromkeys((one.node for one in site.feeders), node))
        attentions = self._attentions(sites)
        taken = {node for attention in attentions for node in attention}
        for node in channels.nodes:
            if (
                channels.kinds[node] is not Kind.WEIGHTED
                or node in self.last
                or node in taken | self.normalised_by.keys()
            ):
                continue
            if self._can_be_written(node):
                sites[node] = _Site(node, (Source(node, (), np.arange(channels.block_of_node(node).size)),))
        grouped = self._by_layer(sites)
        for attention in attentions:
            feeders = tuple(Source(node, (), np.arange(len(units))) for node, units in attention.items())
            first = next(iter(attention))
            grouped.append([_Site(node, feeders if node is first else (), units) for node, units in attention.items()])
        order = {node: place for place, node in enumerate(channels.nodes)}
        return sorted(grouped, key=lambda group: order[group[0].node])

    def _norm_site(self, node: fx.Node) -> _Site | None:
        channels = self.channels
        module = module_of(channels.graph_module, node)
        if not isinstance(module, nn.Module) or module.weight is None:
            return None
        axis = -1 if isinstance(module, nn.LayerNorm) else 1
        feeders = tuple(sources(channels, channels.vector(channels.inputs(node)[0], axis)))
        if channels.labels[node] is None or not self._reads_layers(node):
            return None
        if feeders and all(one.node in self.last for one in feeders):
            return None
        if channels.block_of(int(channels.vector(node, axis)[0])).node is not node:  # it has no channels of its own
            return None
        if isinstance(module, nn.LayerNorm) and not self._reads_alone(node, feeders):
            return None
        if not self._can_be_written(node):
            return None
        return _Site(node, feeders)

    def _can_be_written(self, node: fx.Node) -> bool:
        """Whether zeros in rows of its parameters are zeros in its channels, and change nothing else."""
        known = self.lowered[str(node.target)]
        if not known.tensors:
            self.reasons[node] = "its weights are constants of the network's code"
        elif not known.writable:
            self.reasons[node] = "its weights are computed from others in a way that no zeros can be written into"
        else:
            written = {name for name, _ in (*(known.weight or ()), *(known.bias or ()))}
            theirs = {other for name in written for other in self.readers[name]}
            others = sorted(other for other in theirs if self.lowered[other].weight != known.weight)
            if not written & self.outside and not others:
                return True
            what = f"layer {others[0]}" if others else "something that is no layer"
            self.reasons[node] = f"{what} reads its weights too"
        return False

    def _reads_layers(self, node: fx.Node) -> bool:
        """Whether layers with weights stand before the node."""
        front, seen = list(node.all_input_nodes), set()
        while front:
            one = front.pop()
            if self.channels.kinds[one] in (Kind.WEIGHTED, Kind.OPAQUE):
                return True
            if one not in seen:
                seen.add(one)
                front.extend(one.all_input_nodes)
        return False

    def _reads_alone(self, norm: fx.Node, found: Sequence[Source]) -> bool:
        """Whether a normalisation reads one layer, and alone."""
        if len(found) != 1 or found[0].norms:
            return False
        node = found[0].node
        while node is not norm:
            if len(node.users) != 1:
                return False
            node = next(iter(node.users))
        return True

    def _attentions(self, sites: Mapping[fx.Node, _Site]) -> list[dict[fx.Node, np.ndarray]]:
        """The attentions whose heads are neurons: those whose layers serve nothing else."""
        found: list[dict[fx.Node, np.ndarray]] = []
        taken: set[fx.Node] = set()
        for attention in heads(self.channels):
            free = all(
                node not in self.last and node not in self.normalised_by and node not in taken and self._uses(node) == 1
                and self._can_be_written(node)
                for node in attention
            )  # fmt: skip
            if free:
                found.append(attention)
                taken.update(attention)
        return found

    def _weight(self, node: fx.Node) -> str:
        known = self.lowered[str(node.target)]
        return str(known.weight) if known.weight else str(node.target)

    def _uses(self, node: fx.Node) -> int:
        name = self._weight(node)
        return sum(
            one.op == "call_module" and str(one.target) in self.lowered and self._weight(one) == name
            for one in self.channels.nodes
        )

    def _by_layer(self, sites: Mapping[fx.Node, _Site]) -> list[list[_Site]]:
        """The sites of each layer; one that is used several times must be masked at each use."""
        by_layer: dict[str, list[_Site]] = {}
        for site in sites.values():
            by_layer.setdefault(self._weight(site.node), []).append(site)
        grouped = []
        for group in by_layer.values():
            if self._uses(group[0].node) == len(group):
                grouped.append(group)
                continue
            for site in group:
                self.reasons[site.node] = (
                    "it is used several times in one pass, and not alike; give each use a layer of its own"
                )
                for source in site.feeders:
                    if self.normalised_by.get(source.node) is site.node:
                        self.reasons[source.node] = (
                            f"it is normalised by {self._name(site.node)}, which is used several times"
                        )
        return grouped

    def _layer(
        self,
        sites: Sequence[_Site],
        start: int,
        index: int,
        index_of: Mapping[fx.Node, int],
        units_of: Mapping[fx.Node, np.ndarray | None],
        numbers: np.ndarray,
    ) -> NeuronLayer:
        channels, site = self.channels, sites[0]
        axis = self._axis(site.node)
        labels = channels.vector(site.node, axis)
        if site.units is None:
            size, own = len(labels), numbers[labels]
        else:
            size = max(int(one.units.max()) for one in sites if one.units is not None) + 1
            own = channels.count + start + np.arange(size)  # heads share no sum
        feeders: dict[str, Feeder] = {}
        for one in sites:
            for source in one.feeders:
                feeders.setdefault(str(source.node.target), self._feeder(source, one, units_of, index_of, index))
        is_alone = len(site.feeders) == 1 and not site.feeders[0].norms and self._is_alone(site, len(sites))
        parts: dict[tuple, Part] = {}
        for one in sites:
            known = self.lowered[str(one.node.target)]
            weights, biases = known.weight or (), known.bias or ()
            parts.setdefault((weights, biases), Part(str(one.node.target), weights, biases, one.units))
        return NeuronLayer(
            name=self._name(site.feeders[0].node if is_alone else site.node),
            parts=tuple(parts.values()),
            normalised=channels.kinds[site.node] is Kind.NORM,
            node=site.node.name,
            size=size,
            start=start,
            feeders=tuple(feeders.values()),
            classes=own,
            axis=axis,
        )

    def _is_alone(self, site: _Site, sites: int) -> bool:
        """Whether the neurons of a layer are those of one convolution or linear layer, whose name they bear."""
        node = site.feeders[0].node
        return node is site.node or (
            sites == 1 and self._uses(node) == 1 and self._reads_alone(site.node, site.feeders)
        )

    def _axis(self, node: fx.Node) -> int:
        return -1 if isinstance(module_of(self.channels.graph_module, node), nn.Linear | nn.LayerNorm) else 1

    def _feeder(
        self,
        source: Source,
        site: _Site,
        units_of: Mapping[fx.Node, np.ndarray | None],
        index_of: Mapping[fx.Node, int],
        own: int,
    ) -> Feeder:
        """A layer that feeds a site, with the neurons it reads at any of its uses."""
        channels = self.channels
        rows = np.full(channels.block_of_node(source.node).size, -1)
        places = np.flatnonzero(source.channels >= 0)
        units = units_of[site.node]
        if units is None:
            rows[source.channels[places]] = places
        else:
            rows[:] = units_of[source.node]
        name = self._weight(source.node)
        upstream: dict[int, np.ndarray] = {}
        for use in channels.nodes:
            if use.op != "call_module" or str(use.target) not in self.lowered or self._weight(use) != name:
                continue
            axis = -1 if isinstance(module_of(channels.graph_module, use), nn.Linear) else 1
            for reached in sources(channels, channels.vector(channels.inputs(use)[0], axis), set(index_of)):
                number = index_of.get(reached.node)
                if number is not None and number != own:
                    theirs = units_of[reached.node]
                    columns = (
                        reached.channels
                        if theirs is None
                        else np.where(reached.channels >= 0, theirs[reached.channels], -1)
                    )
                    upstream.setdefault(number, columns)
        return Feeder(
            module=str(source.node.target),
            norms=tuple(str(norm.target) for norm in source.norms),
            rows=rows,
            upstream=tuple(upstream),
            columns=tuple(upstream.values()),
            scale=self._scale(source.node, index_of),
        )

    def _scale(self, node: fx.Node, index_of: Mapping[fx.Node, int]) -> str | None:
        """The normalisation without neurons that a layer reads directly."""
        node = self.channels.inputs(node)[0]
        while self.channels.kinds[node] is Kind.ZERO_PRESERVING:
            node = self.channels.inputs(node)[0]
        is_norm = self.channels.kinds[node] is Kind.LIVE_NORM and node.op == "call_module"
        return str(node.target) if is_norm and node not in index_of else None

    def _accounts(self, layers_of_sites: Sequence[Sequence[_Site]]) -> list[Account]:
        channels = self.channels
        units = {site.node: site.units for sites in layers_of_sites for site in sites}
        accounts: dict[str, Account] = {}

        def add(key: str, account: Account) -> None:
            if key not in accounts or account.units < accounts[key].units:  # of several uses the one that is left out
                accounts[key] = account

        for node in channels.nodes:
            if channels.kinds[node] is Kind.WEIGHTED:
                add(str(node.target), self._account(node, units))
            for name, size in self._weights_of(node):
                by = operation(node)
                add(
                    name,
                    Account(name, size, 0, reason=f"its weights are used by {by}, in which no neurons are looked for"),
                )
        return list(accounts.values())

    def _account(self, node: fx.Node, units: Mapping[fx.Node, np.ndarray | None]) -> Account:
        """Of a convolution or linear layer."""
        name, size = self._name(node), self.channels.block_of_node(node).size
        if node in self.last:
            return Account(name, size, 0, True, "the logits come from it")
        if node in units:
            own = units[node]
            count = size if own is None else int((own >= 0).sum())
            return Account(name, size, count, reason=None if count == size else "some of its channels are of no head")
        if self.normalised_by.get(node) in units:
            return Account(name, size, size)
        return Account(name, size, 0, reason=self.reasons.get(node) or "its channels could not be followed")

    def _weights_of(self, node: fx.Node) -> list[tuple[str, int]]:
        """Parameters that an operation multiplies by, other than those of convolutions and linear layers, and their channels."""
        if self.channels.kinds[node] is Kind.OPAQUE:
            front = list(node.all_input_nodes)
            front = [one for one in front if one.op == "get_attr"] or front[
                1:
            ]  # weights may be computed from the images
        elif operation(node) in PRODUCTS_OF_MATRICES:
            front = [one for one in node.all_input_nodes if one.op == "get_attr"]
        else:
            return []
        found: dict[str, int] = {}
        seen: set[fx.Node] = set()
        while front:
            one = front.pop()
            if one in seen or self.channels.kinds[one] in (Kind.WEIGHTED, Kind.IMAGES):
                continue
            seen.add(one)
            for name in one.meta.get("read", ()):
                shape = one.meta["shape"]
                if name in self.channels.graph_module.meta["parameters"] and len(shape) > 1:
                    short = name.removeprefix(self.prefix).removesuffix(".weight")
                    found[short] = shape[-1] if operation(node) in ("matmul", "mm", "einsum", "bmm") else shape[0]
            front.extend(one.all_input_nodes)
        return list(found.items())

    def _notes(self, index_of: Mapping[fx.Node, int]) -> list[str]:
        """Batch normalisations that no neuron is masked at."""
        notes = []
        for node in self.channels.nodes:
            module = module_of(self.channels.graph_module, node)
            if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or node in index_of:
                continue
            if module.weight is None:
                why = "it has no weight (affine=False), so what it reads is pruned before it"
            else:
                why = self.reasons.get(node) or "it reads no layer that has neurons"
            notes.append(f"The batch normalisation {self._name(node)} has no neurons: {why}.")
        if self.channels.graph_module.meta["live"]:
            notes.append(
                "A batch normalisation without running statistics makes answers depend on the other images of a batch; masks are "
                "right for whole batches alone."
            )
        return notes

    def _insert_masks(self, layers_of_sites: Sequence[Sequence[_Site]], layers: Sequence[NeuronLayer]) -> None:
        """Give the graph one more input a layer, and multiply the layer's values by it wherever it is used."""
        graph_module = self.channels.graph_module
        graph = graph_module.graph
        last_input = next(node for node in graph.nodes if node.op == "placeholder")
        for index, sites in enumerate(layers_of_sites):
            with graph.inserting_after(last_input):
                last_input = graph.placeholder(f"neuron_mask_{index}", default_value=None)
            last_input.meta["size"] = layers[index].size
            for place, site in enumerate(sites):
                arguments: tuple = (site.node, last_input, self._axis(site.node))
                if site.units is not None:
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
