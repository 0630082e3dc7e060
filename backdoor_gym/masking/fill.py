"""What pruned neurons give: zero, or their clean mean (mean replacement; Evci et al. 2018, arXiv:1812.10161)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import DataError
from ..neurons.channels import mask_channels
from ..neurons.layers import NeuronLayer, Neurons
from ..neurons.operations import operation
from ..wording import shown
from .sizes import Sizes

FILLS = ("zero", "mean")


def check_fill(kind: Any) -> None:
    """Raise ``DataError`` unless it is "zero" or "mean"."""
    if not isinstance(kind, str) or kind not in FILLS:
        raise DataError(f'fill must be "zero" or "mean", not {shown(kind)}')


def fill_values(neurons: Neurons, images: Tensor, kind: str = "mean") -> Tensor:
    """The constant that each neuron gives where it is pruned, float32 (neurons,) on the CPU.

    With "mean" it makes what follows see the mean of these images: where an activation with an inverse alone reads the neuron
    (and max pooling), the value that it takes to the mean of what comes out; else the mean of the neuron itself. Zero where the
    network cannot hold a constant exactly: in layers without a bias, or with one that is computed from others, that are
    used several times, and for heads of attention.

    Args:
        neurons: of the network.
        images: clean ones, float32 (n, C, H, W) in [0, 1].
        kind: "zero" or "mean".

    Raises:
        DataError: another kind.
    """
    check_fill(kind)
    fill = torch.zeros(len(neurons))
    if kind == "zero":
        return fill
    seen: dict[int, tuple[int, list[fx.Node]]] = {}
    for index, layer in enumerate(neurons.layers):
        node = _constant_site(neurons, index, layer)
        if node is not None:
            seen[index] = layer.axis, [node, *_followers(node)]
    means = _means(neurons, images, {node: axis for axis, nodes in seen.values() for node in (nodes[0], nodes[-1])})
    for index, (_, (node, *followers)) in seen.items():
        own, constant = means[node], means[followers[-1] if followers else node]
        for follower in reversed(followers):
            inverse = _INVERSES.get(operation(follower))
            constant = constant if inverse is None else inverse(follower, constant)
        constant = torch.where(constant.isfinite(), constant, own).float()
        fill[neurons.layers[index].neurons] = torch.where(constant.isfinite(), constant, torch.zeros(()))
    return fill


def _constant_site(neurons: Neurons, index: int, layer: NeuronLayer) -> fx.Node | None:
    """The one node that masks the layer, None where a constant written into its bias would not be what comes there."""
    sites = [
        node
        for node in neurons.graph.graph.nodes
        if node.target is mask_channels and node.args[1].name == f"neuron_mask_{index}"
    ]
    of_heads = any(len(node.args) > 3 for node in sites)
    if len(sites) != 1 or len(layer.parts) != 1 or of_heads:
        return None
    part = layer.parts[0]
    return sites[0] if part.biases and neurons.graph.meta["lowered"][part.module].plain_bias else None


def _followers(node: fx.Node) -> list[fx.Node]:
    """Activations with an inverse, and operations that leave constants as they are, as long as each alone reads the last."""
    followers: list[fx.Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        alone = len(node.all_input_nodes) == 1 and node.op != "call_module" and "shape" in node.meta
        if not alone or (operation(node) not in _INVERSES and operation(node) not in _KEEPING):
            break
        followers.append(node)
    return followers


def _means(neurons: Neurons, images: Tensor, axes: dict[fx.Node, int]) -> dict[fx.Node, Tensor]:
    """Mean of each channel of some values over all images and positions, float64 (channels,)."""
    reader = _MeanReader(neurons.graph, axes)
    device = next(iter(neurons.graph.parameters())).device
    at_once = Sizes(neurons.graph, images[:1].to(device)).images_at_once
    with torch.no_grad():
        for batch in images.split(at_once):
            reader.run(batch.to(device))
    return {node: total / reader.counts[node] for node, total in reader.totals.items()}


class _MeanReader(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, axes: dict[fx.Node, int]) -> None:
        super().__init__(graph)
        self.axes = axes
        self.totals: dict[fx.Node, Tensor] = {}
        self.counts: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.axes:
            others = [axis for axis in range(value.ndim) if axis != self.axes[n] % value.ndim]
            total = value.sum(others, dtype=torch.float32).cpu().double()
            self.totals[n] = self.totals[n] + total if n in self.totals else total
            self.counts[n] = self.counts.get(n, 0) + math.prod(value.shape[axis] for axis in others)
        return value


def _argument(node: fx.Node, name: str, default: float) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name, default)


def _of_leaky_relu(node: fx.Node, mean: Tensor) -> Tensor:
    slope = _argument(node, "negative_slope", 0.01)
    return torch.where(mean < 0, mean / slope if slope > 0 else mean * torch.nan, mean)


def _of_elu(node: fx.Node, mean: Tensor) -> Tensor:
    return torch.where(mean < 0, torch.log1p(mean / _argument(node, "alpha", 1.0)), mean)


#: For each activation, what it takes to these means, which are among its values; not a number where that is unknown.
_INVERSES: dict[str, Callable[[fx.Node, Tensor], Tensor]] = {
    "relu": lambda _, mean: mean,
    "relu6": lambda _, mean: mean,
    "hardtanh": lambda _, mean: mean,
    "leaky_relu": _of_leaky_relu,
    "elu": _of_elu,
    "tanh": lambda _, mean: mean.atanh(),
    "sigmoid": lambda _, mean: mean.logit(),
}
#: They take maps of constants to maps of these constants.
_KEEPING = frozenset({
    "max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "dropout", "dropout1d", "dropout2d", "clone",
    "contiguous", "detach",
})  # fmt: skip
