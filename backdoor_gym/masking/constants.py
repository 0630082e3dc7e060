"""Constants that pruned channels give, moved into the layer that reads them, so that the channels can be cut out."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..neurons.channels import Channels, Kind, filled, module_of
from ..neurons.layers import Neurons

#: Largest difference between the values of a constant channel, over the largest of them, that rounding may make.
ROUNDING = 1e-5
#: Images that constants are read of.
IMAGES = 16


@dataclass(frozen=True, eq=False)
class Reading:
    """What a layer reads under a mask, by its inputs.

    Attributes:
        values: mean of each input, float64 (inputs,).
        steady: which are the same for all images at all positions, bool (inputs,).
    """

    values: Tensor
    steady: np.ndarray


@dataclass(frozen=True, eq=False)
class Move:
    """Where the constants that a layer reads can go.

    Attributes:
        weight: name of the layer's weight in the network.
        groups: of the layer.
        target: name of what takes the constants up: its bias, or the running mean of the BN behind it.
        sign: by which they are added there.
        values: the constant of each input, float64 (inputs,).
    """

    weight: str
    groups: int
    target: str
    sign: int
    values: Tensor

    def do(self, network: nn.Module, places: Iterable[int]) -> None:
        """Add what these inputs give, as long as the weight has all of them."""
        weight, target = attrgetter(self.weight)(network), attrgetter(self.target)(network)
        values, gone = torch.zeros_like(self.values), sorted(places)
        values[gone] = self.values[gone]
        by_input = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()
        by_input = by_input.view(self.groups, -1, by_input.shape[1])
        change = (by_input @ values.view(self.groups, -1, 1)).flatten()
        target.copy_(target.double() + self.sign * change)


def readings(
    channels: Channels, neurons: Neurons, mask: np.ndarray, fill: Tensor, images: Tensor
) -> dict[fx.Node, Reading]:
    """What each convolution and linear layer reads.

    Args:
        channels: of the graph of the neurons.
        neurons: of the network.
        mask: bool (neurons,), True where kept.
        fill: what each neuron gives where it is pruned, float32 (neurons,).
        images: float32 (n, C, H, W).
    """
    reader = _Reader(channels)
    device = next(iter(neurons.graph.parameters())).device
    masks = filled(neurons.layer_masks(mask, device), neurons.layer_fills(fill, device))
    with torch.no_grad():
        reader.run(images[:IMAGES].to(device), *masks)
    return reader.readings


def move(channels: Channels, node: fx.Node, network: nn.Module, values: Tensor) -> Move | str:
    """Where the constants that a layer reads can go exactly, or why nowhere.

    Args:
        channels: of the graph that the node is of.
        node: the layer.
        network: that the graph was traced from.
        values: the constant of each of its inputs, float64 (inputs,).
    """
    module, layer = module_of(channels.graph_module, node), channels.lowered[str(node.target)]
    if not layer.is_plain:
        return f"the weights of {layer.name} are no parameter as it is, and their constants cannot go into its bias"
    if _pads(module):
        return f"{layer.name} pads what it reads with zeros, and there their constants cannot go into its bias"
    weight, groups = f"{node.target}.weight", getattr(module, "groups", 1)
    if layer.plain_bias and layer.bias:
        return Move(weight, groups, layer.bias[0][0], 1, values)
    mean = _mean_behind(channels, node, network)
    if mean is not None:
        return Move(weight, groups, mean, -1, values)
    return f"{layer.name} has no bias that their constants could go into"


class _Reader(fx.Interpreter):
    def __init__(self, channels: Channels) -> None:
        super().__init__(channels.graph_module)
        self.axes: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for node in channels.nodes:
            if channels.kinds[node] is Kind.WEIGHTED:
                self.axes.setdefault(channels.inputs(node)[0], []).append((node, channels.axis(node)))
        self.readings: dict[fx.Node, Reading] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for node, axis in self.axes.get(n, ()):
            by_input = value.transpose(axis, -1).flatten(0, -2)
            differences = by_input.amax(0) - by_input.amin(0)
            steady = differences <= ROUNDING * by_input.abs().amax(0)
            self.readings[node] = Reading(by_input.cpu().double().mean(0), steady.cpu().numpy())
        return value


def _pads(module: nn.Module | None) -> bool:
    """Whether a convolution adds zeros at the borders of what it reads."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and max(module.kernel_size) > 1
    return max(module.padding) > 0


def _mean_behind(channels: Channels, node: fx.Node, network: nn.Module) -> str | None:
    """The running mean of the BN that alone reads a layer, None where there is none."""
    reader = next(iter(node.users))
    if len(node.users) > 1 or channels.kinds[reader] is not Kind.NORM or len(channels.uses(reader)) > 1:
        return None
    own = network.get_submodule(str(reader.target)) if channels.lowered[str(reader.target)].is_plain else None
    return f"{reader.target}.running_mean" if isinstance(getattr(own, "running_mean", None), Tensor) else None
