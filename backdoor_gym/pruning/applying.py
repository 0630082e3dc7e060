"""Masks made permanent: zeros written into the weights, or the channels cut out of the network."""

import copy
import warnings

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import CompactionError
from .channels import Kind, kind_of, tensor_inputs
from .neurons import Neurons


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
        with warnings.catch_warnings():
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
    """For each channel space: a layer that writes it, and the channels that only zeros are read from."""
    graph_module = neurons.graph
    zeros: dict[fx.Node, np.ndarray] = {}
    readers: dict[fx.Node, list[np.ndarray]] = {}
    writers: dict[fx.Node, fx.Node] = {}
    masked = iter(neurons.layers)
    space: dict[fx.Node, fx.Node] = {}

    def top(node: fx.Node) -> fx.Node:
        while space[node] is not node:
            node = space[node]
        return node

    for node in graph_module.graph.nodes:
        kind = kind_of(graph_module, node)
        read = [source for source in tensor_inputs(node) if source in zeros]
        if kind is Kind.WEIGHTED:
            module = graph_module.get_submodule(str(node.target))
            grouped = getattr(module, "groups", 1) > 1  # its inputs cannot be cut one by one
            for source in read:
                readers.setdefault(top(source), []).append(zeros[source] & ~np.bool_(grouped))
            assert isinstance(module.weight, Tensor)
            zeros[node] = np.zeros(module.weight.shape[0], dtype=bool)
            space[node] = node
            writers[node] = node
        elif kind is Kind.OPAQUE or not read:
            for source in read:  # the output, or an operation that mixes channels: nothing it reads may go
                readers.setdefault(top(source), []).append(np.zeros_like(zeros[source]))
        else:
            zero = np.logical_and.reduce([zeros[source] for source in read])
            if kind is Kind.MASK:
                zero = zero | ~mask[next(masked).neurons]
            zeros[node] = zero if kind in (Kind.MASK, Kind.ZERO_PRESERVING, Kind.SUM) else np.zeros_like(zero)
            space[node] = node
            for source in read:
                _join(top(source), node, space, readers, writers)
    found = []
    for node, writer in writers.items():
        dead = np.logical_and.reduce(readers.get(node) or [np.zeros_like(zeros[writer])])
        if dead.all():
            dead[0] = False
        if dead.any():
            found.append((str(writer.target), np.flatnonzero(dead).tolist()))
    return found


def _join(old: fx.Node, new: fx.Node, space: dict, readers: dict, writers: dict) -> None:
    """Let the space ``old`` become a part of ``new``."""
    if old is new:
        return
    space[old] = new
    readers.setdefault(new, []).extend(readers.pop(old, []))
    if old in writers:
        writers[new] = writers.pop(old)
