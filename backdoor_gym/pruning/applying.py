"""Masks made permanent: zeros written into the weights, or the channels cut out of the network."""

import copy
import warnings
from collections import Counter

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import CompactionError
from .channels import CHANNELWISE, Channels, Kind, module_of
from .neurons import Neurons
from .sources import Spaces, is_depthwise


def write_mask(network: nn.Module, neurons: Neurons, mask: np.ndarray, inplace: bool = False) -> nn.Module:
    """The network with the pruned neurons' weights and biases (of the BN where there is one) set to zero.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        mask: bool (neurons,), True where kept.
        inplace: whether to change the network itself instead of a copy.

    Returns:
        A network of the same class, with the same names and shapes in its state dict.
    """
    network = network if inplace else copy.deepcopy(network)
    with torch.no_grad():
        for layer in neurons.layers:
            pruned = torch.from_numpy(np.flatnonzero(~mask[layer.neurons]))
            module = network.get_submodule(layer.module)
            for parameter in (module.weight, module.bias):
                if isinstance(parameter, Tensor):
                    parameter[pruned.to(parameter.device)] = 0
    return network


def cut_channels(network: nn.Module, neurons: Neurons, mask: np.ndarray, images: Tensor) -> nn.Module:
    """A smaller network without the channels that the mask makes useless, with the same outputs.

    A channel can be cut where everything that reads it reads zeros: in a residual network, where all neurons that share
    a sum are pruned. The others are zeroed as in ``write_mask``. At least one channel a layer stays.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        mask: bool (neurons,), True where kept.
        images: float32 (n, C, H, W), to trace the network with and to check that its outputs stay the same.

    Raises:
        CompactionError: the network cannot be cut, or would answer differently.
    """
    import torch_pruning

    masked = write_mask(network, neurons, mask).cpu().eval()
    compact = copy.deepcopy(masked)
    images = images[:64].cpu()
    for parameter in compact.parameters():  # the dependency graph is traced through autograd
        parameter.requires_grad_(True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            dependencies = torch_pruning.DependencyGraph().build_dependency(compact, example_inputs=images[:1].clone())
            for writer, dead in _dead_channels(neurons, mask):
                module = compact.get_submodule(writer)
                cut = (
                    torch_pruning.prune_linear_out_channels
                    if isinstance(module, nn.Linear)
                    else torch_pruning.prune_conv_out_channels
                )
                dependencies.get_pruning_group(module, cut, idxs=dead).prune()
        with torch.no_grad():
            before, after = masked(images.clone()), compact(images.clone())
    except Exception as error:
        raise CompactionError(f"channels cannot be cut out of {type(network).__name__}: {error}") from error
    if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise CompactionError(f"{type(network).__name__} without the pruned channels would answer differently; not cut")
    return compact


def _dead_channels(neurons: Neurons, mask: np.ndarray) -> list[tuple[str, list[int]]]:
    """For each layer that writes channels: its name, and those of its channels that nothing needs.

    A channel is needed where what reads it does not read zeros; and all values of one space (``Spaces``) have the same
    channels, so that what is needed of one of them stays in all.
    """
    channels = Channels(neurons.graph)
    zeros = _zeros(channels, neurons, mask)
    spaces = Spaces(channels, depthwise=True)
    needed = _needed(channels, zeros, spaces)
    found: dict[str, list[int]] = {}
    gone: dict[fx.Node, set[int]] = {top: set() for top in needed}
    for node in channels.nodes:
        if channels.kinds[node] is not Kind.WEIGHTED:
            continue
        top, shift = spaces.of(node)
        # Of a space, those that an earlier layer left.
        left = [channel for channel in range(shift, shift + len(zeros[node])) if channel not in gone[top]]
        dead = [place for place, channel in enumerate(left) if channel not in needed[top]]
        if dead:
            found[str(node.target)] = dead
            gone[top].update(left[place] for place in dead)
    return list(found.items())


def _needed(channels: Channels, zeros: dict[fx.Node, np.ndarray], spaces: Spaces) -> dict[fx.Node, set[int]]:
    """The channels of each space that must stay."""
    needed: dict[fx.Node, set[int]] = {top: set() for top in channels.nodes}
    calls = Counter(node.target for node in channels.nodes if node.op == "call_module")

    def need(node: fx.Node, wanted: np.ndarray | bool = True) -> None:
        if node in zeros:
            top, shift = spaces.of(node)
            needed[top].update((shift + np.flatnonzero(np.broadcast_to(wanted, zeros[node].shape))).tolist())

    for node in channels.nodes:
        kind, inputs = channels.kinds[node], channels.inputs(node)
        known = all(source in zeros for source in inputs)
        if kind is Kind.WEIGHTED:
            grouped = getattr(module_of(channels.graph_module, node), "groups", 1) > 1
            if calls[node.target] > 1 or (grouped and not (is_depthwise(channels, node) and known)):
                need(node)  # other uses, or the images, would have to change too, or groups would differ in size
                for source in inputs:
                    need(source)
            elif not grouped:
                need(inputs[0], ~zeros[inputs[0]] if known else True)
        elif kind not in CHANNELWISE | {Kind.CONCATENATION} or kind is Kind.LIVE_NORM or node not in zeros:
            for source in inputs:  # all of them count there, if only for the statistics
                need(source)
            need(node)
        elif not known or spaces.of(node)[0] in spaces.twisted:
            need(node)
    for node in channels.nodes:
        if channels.kinds[node] is Kind.WEIGHTED:
            top, shift = spaces.of(node)
            if not needed[top] & set(range(shift, shift + len(zeros[node]))):
                needed[top].add(shift)  # a layer keeps one channel at least
    return needed


def _zeros(channels: Channels, neurons: Neurons, mask: np.ndarray) -> dict[fx.Node, np.ndarray]:
    """Of each value whose channels are known: which of them are zero, bool (channels,)."""
    zeros: dict[fx.Node, np.ndarray] = {}
    layer_of = {node: int(str(node.args[1]).removeprefix("neuron_mask_")) for node in _masks(channels)}
    for node in channels.nodes:
        kind, layout = channels.kinds[node], channels.layouts[node]
        if layout is None or layout.size is None or kind in (Kind.CONSTANT, Kind.IMAGES):
            continue
        zero = np.zeros(layout.size, dtype=bool)
        read = [zeros.get(source, zero) for source in channels.inputs(node)]
        if kind is Kind.MASK:
            zero = read[0] | ~mask[neurons.layers[layer_of[node]].neurons]
        elif kind in (Kind.ZERO_PRESERVING, Kind.SUM):
            zero = np.logical_and.reduce(read)
        elif kind is Kind.PRODUCT:
            zero = np.logical_or.reduce(read)
        elif kind is Kind.CONCATENATION:
            for piece, begin in channels.pieces(node):
                if begin is not None and piece in zeros:
                    zero[begin : begin + len(zeros[piece])] = zeros[piece]
        zeros[node] = zero
    return zeros


def _masks(channels: Channels) -> list[fx.Node]:
    return [node for node in channels.nodes if channels.kinds[node] is Kind.MASK]
