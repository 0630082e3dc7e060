"""The prunable neurons of any network that torch.fx can trace.

A neuron is an output channel of a convolution with its normalisation, or a hidden unit of a linear layer. Where a batch
normalisation reads exactly one convolution that nothing else reads, the neuron is named after the convolution
(``layer3.0.conv1[57]``). Where it reads a residual sum (pre-activation networks), the neuron is that channel of the
batch normalisation (``layer3.1.bn1[57]``). A convolution or hidden linear layer that no batch normalisation reads has
neurons of its own. Pruning a neuron makes that channel zero.
"""

import copy
import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock, get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ..errors import UnknownNameError, UntraceableError
from .channels import Kind, kind_of, mask_channels, module_of, sources, tensor_inputs

RESIDUAL_MODES = ("channel", "group")


@dataclass(frozen=True)
class Feeder:
    """A convolution or linear layer that writes into what a neuron layer reads."""

    module: str
    #: Batch normalisations between it and the neuron layer's own.
    norms: tuple[str, ...]
    #: Indices of the neuron layers whose (masked) channels it reads, nearest first.
    upstream: tuple[int, ...]


@dataclass(frozen=True)
class NeuronLayer:
    """The neurons of one layer."""

    name: str
    #: Module whose weights hold the mask: a batch normalisation, or the convolution or linear layer itself.
    module: str
    #: Whether that module is a batch normalisation.
    normalised: bool
    #: Name of the node of the traced graph whose value is masked.
    node: str
    size: int
    #: Index of the first neuron of the layer.
    start: int
    feeders: tuple[Feeder, ...]
    #: Layers of the same number share channels through residual sums.
    space: int

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
                units.setdefault((layer.space, channel), []).append(layer.start + channel)
        return [np.array(members) for members in units.values()]

    def layer_masks(self, mask: np.ndarray, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """A mask of all neurons, bool (neurons,), True where kept, as one mask a layer for ``graph``."""
        parts = (mask[layer.neurons] for layer in self.layers)
        return [None if part.all() else torch.from_numpy(part.astype(np.float32)).to(device) for part in parts]


def find_neurons(network: nn.Module) -> Neurons:
    """Trace a network and find its neurons; the network itself is left as it is.

    Raises:
        UntraceableError: the network cannot be traced, or a layer of it cannot be handled; the message names it.
    """
    graph_module = _trace(network)
    nodes = list(graph_module.graph.nodes)
    kinds = {node: kind_of(graph_module, node) for node in nodes}
    _refuse_shared(nodes, kinds)

    output = next(node for node in nodes if node.op == "output")
    classifiers = {found for node in output.all_input_nodes for found, _ in sources(graph_module, node, set())}
    feeders: dict[fx.Node, list[tuple[fx.Node, list[fx.Node]]]] = {}
    for node in nodes:
        if kinds[node] is Kind.NORM:
            found = list(sources(graph_module, tensor_inputs(node)[0], set()))
            if any(conv not in classifiers for conv, _ in found):
                _check_norm(graph_module, node)
                feeders[node] = found
    normalised = [conv for found in feeders.values() for conv, _ in found]
    for node in nodes:
        if kinds[node] is Kind.WEIGHTED and node not in normalised and node not in classifiers:
            feeders[node] = [(node, [])]

    sites = [node for node in nodes if node in feeders]
    if not sites:
        raise UntraceableError(
            f"{type(network).__name__} has no prunable neuron: no convolution or linear layer before its last one"
        )
    inputs = [node for node in nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise UntraceableError(f"{type(network).__name__}.forward must take images alone, not {len(inputs)} arguments")
    spaces = _spaces(nodes, kinds)
    layers: list[NeuronLayer] = []
    for site in sites:
        found = feeders[site]
        alone = len(found) == 1 and not found[0][1] and (found[0][0] is site or len(found[0][0].users) == 1)
        layers.append(
            NeuronLayer(
                name=str(found[0][0].target if alone else site.target),
                module=str(site.target),
                normalised=kinds[site] is Kind.NORM,
                node=site.name,
                size=_channels(graph_module, site),
                start=layers[-1].start + layers[-1].size if layers else 0,
                feeders=tuple(_feeder(graph_module, conv, norms, sites) for conv, norms in found),
                space=spaces[site],
            )
        )
    _insert_masks(graph_module, sites)
    return Neurons(layers, graph_module)


#: torch.fx patches ``nn.Module`` of the whole process while it traces.
_TRACING = Lock()


class _Tracer(fx.Tracer):
    """Remembers which module's forward is being traced, to name it where tracing fails; other threads go on as they would."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self._thread = get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if get_ident() != self._thread:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result


def _trace(network: nn.Module) -> fx.GraphModule:
    _refuse_computed_weights(network)
    network = copy.deepcopy(network).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    tracer = _Tracer()
    try:
        with _TRACING:
            graph = tracer.trace(network, concrete_args=_defaults(network))
    except Exception as error:  # tracing runs the user's code, which can raise anything on symbolic values
        where = f"layer {tracer.path[-1]}" if tracer.path else "the network's own forward"
        raise UntraceableError(
            f"torch.fx cannot trace {where} ({str(error).splitlines()[0]}); its forward must not branch or loop on the "
            "values or shapes of tensors: move such code out of the network"
        ) from error
    graph_module = fx.GraphModule(network, graph)
    _without_inplace(graph_module)
    # Assertions, tracing's own among them, and what only they read.
    for node in reversed(list(graph_module.graph.nodes)):
        if node.target is torch._assert or (node.op == "call_function" and not node.users):
            graph_module.graph.erase_node(node)
    return graph_module


def _refuse_computed_weights(network: nn.Module) -> None:
    """Zeros written into a weight that is computed from other parameters would be lost."""
    for name, module in network.named_modules():
        hooks = module._forward_pre_hooks.values()
        if is_parametrized(module) or any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in hooks):
            raise UntraceableError(
                f"the weights of layer {name} are computed from others (weight or spectral normalisation); make them "
                "plain first (torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm)"
            )


def _defaults(network: nn.Module) -> dict[str, Any]:
    """The defaults of all arguments of ``forward`` but the first: it is traced as it is called with images alone."""
    arguments = list(inspect.signature(network.forward).parameters.values())[1:]
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def _without_inplace(graph_module: fx.GraphModule) -> None:
    """Replace in-place operations, which would overwrite activations that are kept, and ``view``, which needs one layout.

    What reads the overwritten value later reads the result instead, also where the code drops the returned value.
    """
    plain = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, F.relu_: F.relu}
    modules = {name: module for name, module in graph_module.named_modules() if getattr(module, "inplace", False)}
    for module in modules.values():
        module.inplace = False
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    for node in order:
        in_place = node.op == "call_module" and node.target in modules
        if node.op == "call_function":
            in_place = node.target in plain or bool(node.kwargs.get("inplace"))
            node.target = plain.get(node.target, node.target)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        elif node.op == "call_method" and isinstance(node.target, str):
            if node.target.endswith("_") and hasattr(Tensor, node.target[:-1]):
                in_place, node.target = True, node.target[:-1]
            if node.target == "view":
                node.target = "reshape"
        if in_place and isinstance(node.args[0], fx.Node):
            overwritten = node.args[0]
            for reader in list(overwritten.users):
                if order[reader] > order[node]:
                    reader.replace_input_with(overwritten, node)


def _refuse_shared(nodes: Sequence[fx.Node], kinds: Mapping[fx.Node, Kind]) -> None:
    seen = set()
    for node in nodes:
        if kinds[node] in (Kind.WEIGHTED, Kind.NORM):
            if node.target in seen:
                raise UntraceableError(
                    f"layer {node.target} is used twice in one pass; give each use a layer of its own"
                )
            seen.add(node.target)


def _check_norm(graph_module: fx.GraphModule, node: fx.Node) -> None:
    norm = module_of(graph_module, node)
    if norm is None or norm.weight is None or norm.running_var is None:
        raise UntraceableError(
            f"the batch normalisation {node.target} needs affine=True and track_running_stats=True to be pruned"
        )


def _channels(graph_module: fx.GraphModule, node: fx.Node) -> int:
    weight = graph_module.get_submodule(str(node.target)).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _feeder(graph_module: fx.GraphModule, conv: fx.Node, norms: Sequence[fx.Node], sites: list[fx.Node]) -> Feeder:
    upstream = [found for found, _ in sources(graph_module, tensor_inputs(conv)[0], set(sites))]
    return Feeder(
        module=str(conv.target),
        norms=tuple(str(norm.target) for norm in norms),
        upstream=tuple(sites.index(node) for node in upstream if node in sites),
    )


def _spaces(nodes: Sequence[fx.Node], kinds: Mapping[fx.Node, Kind]) -> dict[fx.Node, int]:
    """Number the channel spaces: nodes joined by channelwise operations and sums have the same channels."""
    parent = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in nodes:
        if kinds[node] in (Kind.NORM, Kind.ZERO_PRESERVING, Kind.CHANNELWISE, Kind.SUM):
            for source in tensor_inputs(node):
                if kinds[source] is not Kind.INPUT:
                    parent[root(source)] = root(node)
    numbers = {top: number for number, top in enumerate(dict.fromkeys(root(node) for node in nodes))}
    return {node: numbers[root(node)] for node in nodes}


def _insert_masks(graph_module: fx.GraphModule, sites: Sequence[fx.Node]) -> None:
    """Give the graph one more input a layer, and multiply the layer's value by it."""
    graph = graph_module.graph
    for unused in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        graph.erase_node(unused)
    last_input = next(node for node in graph.nodes if node.op == "placeholder")
    for index, site in enumerate(sites):
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(f"neuron_mask_{index}", default_value=None)
        with graph.inserting_after(site):
            masked = graph.call_function(mask_channels, (site, last_input))
        for reader in list(site.users):
            if reader is not masked:
                reader.replace_input_with(site, masked)
    graph_module.recompile()
