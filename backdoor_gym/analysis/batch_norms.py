"""What the batch normalisations of a network read: mean inputs over some images, which may be moved elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, fx, nn

from ..neurons.layers import NeuronLayer, Neurons


def normalised_layers(neurons: Neurons) -> list[NeuronLayer]:
    """The layers of neurons that end in a batch normalisation."""
    return [layer for layer in neurons.layers if layer.normalised]


def early_half(norms: Sequence[NeuronLayer]) -> list[str]:
    """Names of the nodes of the first half of some layers: what images look like shows there, what they are later."""
    return [layer.node for layer in norms[: len(norms) // 2]]


def running_statistics(graph: nn.Module, norms: Sequence[NeuronLayer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Running mean and standard deviation of the BN of each layer, by the name of its node; float32 (channels,)."""
    means, deviations = {}, {}
    for layer in norms:
        norm = graph.get_submodule(layer.module)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        means[layer.node], deviations[layer.node] = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    return means, deviations


def class_weights(labels: Tensor) -> Tensor:
    """Weights of images with which every class that is there weighs the same, float32 (n,), of sum 1."""
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    return 1 / (counts[classes] * len(counts))


def by_image(inputs: Tensor, count: int) -> Tensor:
    """What a batch normalisation reads, as (images, channels, positions).

    Tokens or windows that stand among the images, one image's after the other's, are positions.
    """
    values = inputs.flatten(2) if inputs.ndim > 2 else inputs.unsqueeze(2)
    if len(values) == count:
        return values
    return values.reshape(count, -1, *values.shape[1:]).transpose(1, 2).flatten(2)


class NormReader(fx.Interpreter):
    """Runs the graph and reads the mean input of each BN layer over the images, or moves it to the one that is given.

    Attributes:
        means: those that layers are moved to, float32 (channels,).
        moves: by how much each layer's input was moved, float32 (channels,).
        logits: float32 (n, classes).
    """

    def __init__(self, neurons: Neurons, weights: Tensor, means: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(neurons.graph)
        self.weights, self.means = weights, means or {}
        self.moves: dict[str, Tensor] = {}
        self.logits = torch.empty(0)
        self._read: dict[str, Tensor] = {}
        self._count = 0
        self._norms = {layer.node for layer in neurons.layers if layer.normalised}

    def run_on(self, images: Tensor) -> Self:
        """Run the graph on images, float32 (n, C, H, W)."""
        self._count = len(images)
        self.logits = self.run(images)
        return self

    def mean(self, name: str, weights: Tensor) -> Tensor:
        """Mean that a layer's input had before it was moved, over the first images, by their weights."""
        return weights @ self._read[name][: len(weights)]

    def run_node(self, n: fx.Node) -> Tensor:
        if n.name not in self._norms:
            return super().run_node(n)
        inputs = self.env[n.all_input_nodes[0]]
        self._read[n.name] = by_image(inputs, self._count).mean(2)
        if n.name in self.means:
            move = self.means[n.name] - self.mean(n.name, self.weights)
            self.moves[n.name] = move
            inputs = inputs + move.view(-1, *[1] * (inputs.ndim - 2))
        return self.submodules[str(n.target)](inputs)
