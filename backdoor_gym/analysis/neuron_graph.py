"""The neuron graph: links by connection strength between layers, and by similarity inside a layer.

- *Connection* (kind 0): from a neuron of an earlier layer to one that reads it. Its strength is the L1 norm of the
  kernel between the two channels; each neuron keeps its strongest ``connections`` inputs. Where the layer reads a
  residual sum, the neurons whose channels were added are its inputs alike, the nearest first; where it reads a
  concatenation, each of them for its own channels.
- *Similarity* (kind 1): between neurons of one layer whose vectors of connection strengths have a cosine of at least
  ``ALIKE`` (ONP, 2024: neurons linked by connectivity); each neuron keeps its ``similar`` most similar ones.

Strengths are divided by the largest of their layer, so that all lie in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..neurons.layers import Feeder, NeuronLayer, Neurons

EDGE_FEATURES = ("strength", "similarity")
#: The least cosine similarity of neighbours.
ALIKE = 0.5


@dataclass(frozen=True)
class NeuronGraph:
    """Edges between neurons.

    Attributes:
        edges: float32 (E, 2): strength in [0, 1], and 1 for a similarity link or 0 for a connection.
        edge_links: int64 (E, 2): from which neuron to which.
    """

    edges: np.ndarray
    edge_links: np.ndarray


def max_edges(num_neurons: int, connections: int, similar: int) -> int:
    """The most edges that a graph of so many neurons can have."""
    return num_neurons * (connections + similar)


def neuron_graph(network: nn.Module, neurons: Neurons, connections: int = 4, similar: int = 4) -> NeuronGraph:
    """The graph of a network's neurons.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        connections: how many of its strongest inputs each neuron keeps.
        similar: how many of its most similar neighbours each neuron keeps.
    """
    edges: list[np.ndarray] = []
    links: list[np.ndarray] = []
    for layer in neurons.layers:
        strengths = [connection_strengths(network, neurons, feeder) for feeder in layer.feeders]
        for selected, kind in (
            (_connections(layer, strengths, neurons, connections), 0.0),
            (_similarities(layer, strengths, similar), 1.0),
        ):
            strength, link = selected
            edges.append(np.stack([strength, np.full_like(strength, kind)], axis=1))
            links.append(link)
    return NeuronGraph(np.concatenate(edges).astype(np.float32), np.concatenate(links).astype(np.int64))


def input_strengths(network: nn.Module, neurons: Neurons) -> np.ndarray:
    """L1 norm of all that each neuron is connected by, over the largest of its layer, float64 in [0, 1] (neurons,)."""
    shares = []
    for layer in neurons.layers:
        total = np.zeros(layer.size)
        for feeder in layer.feeders:
            strength = connection_strengths(network, neurons, feeder).sum(axis=1)
            np.add.at(total, feeder.rows[feeder.rows >= 0], strength[feeder.rows >= 0])
        shares.append(total / total.max() if total.any() else np.ones(layer.size))
    return np.concatenate(shares)


@torch.no_grad()
def connection_strengths(network: nn.Module, neurons: Neurons, feeder: Feeder) -> np.ndarray:
    """L1 norm of the kernel between each output and input channel, float64 (C_out, C_in).

    A linear layer that reads a flattened image has several inputs a channel here; ``_connections`` adds them up.
    """
    module = neurons.layer_in(network, feeder.module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    strength = weight.detach().double().abs().flatten(2).sum(2) if weight.ndim > 2 else weight.detach().double().abs()
    groups = getattr(module, "groups", 1)
    if groups > 1:  # each group of outputs reads its own inputs
        blocks = strength.view(groups, -1, strength.shape[1])
        strength = torch.block_diag(*blocks)
    return strength.cpu().numpy()


Links = tuple[np.ndarray, np.ndarray]
_NONE: Links = (np.zeros(0), np.zeros((0, 2), dtype=np.int64))


def _connections(layer: NeuronLayer, strengths: list[np.ndarray], neurons: Neurons, most: int) -> Links:
    blocks, senders = [], []
    for feeder, strength in zip(layer.feeders, strengths, strict=True):
        by_neuron = _rows(layer, feeder, strength)
        for index, columns in zip(feeder.upstream, feeder.columns, strict=True):
            upstream = neurons.layers[index]
            block = np.zeros((upstream.size, layer.size))
            np.add.at(block, columns[columns >= 0], by_neuron[:, columns >= 0].T)
            blocks.append(block.T)
            senders.append(np.arange(upstream.start, upstream.start + upstream.size))
    if not blocks or most < 1:
        return _NONE
    return _strongest(np.concatenate(blocks, axis=1), np.concatenate(senders), layer, most)


def _rows(layer: NeuronLayer, feeder: Feeder, strength: np.ndarray) -> np.ndarray:
    """Strengths of a feeder's channels as those of the layer's neurons, zeros where others feed them."""
    rows = np.zeros((layer.size, strength.shape[1]))
    np.add.at(rows, feeder.rows[feeder.rows >= 0], strength[feeder.rows >= 0])
    return rows


def _similarities(layer: NeuronLayer, strengths: list[np.ndarray], most: int) -> Links:
    if layer.size < 2 or most < 1 or not strengths:  # a normalisation of what no layer gives has no weights to compare
        return _NONE
    vectors = np.concatenate(
        [_rows(layer, feeder, strength) for feeder, strength in zip(layer.feeders, strengths, strict=True)], axis=1
    )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 0)
    cosine[cosine < ALIKE] = 0
    return _strongest(cosine, np.arange(layer.start, layer.start + layer.size), layer, most, scale=False)


def _strongest(matrix: np.ndarray, senders: np.ndarray, layer: NeuronLayer, most: int, scale: bool = True) -> Links:
    """The ``most`` largest positive entries of each row; equal ones in the order given."""
    chosen = np.argsort(-matrix, axis=1, kind="stable")[:, :most]
    strength = np.take_along_axis(matrix, chosen, axis=1).ravel()
    receivers = np.repeat(np.arange(layer.start, layer.start + layer.size), chosen.shape[1])
    link = np.stack([senders[chosen.ravel()], receivers], axis=1)
    positive = strength > 0
    strength, link = strength[positive], link[positive]
    if scale and len(strength):
        strength = strength / strength.max()
    return np.minimum(strength, 1.0), link
