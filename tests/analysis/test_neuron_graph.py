import numpy as np
import torch
from torch import nn

from backdoor_gym.analysis.neuron_graph import input_strengths, max_edges, neuron_graph
from backdoor_gym.neurons.finding import find_neurons

from ..tiny import tiny


def links_of(graph, similarity: bool):
    return {
        (int(a), int(b)): float(strength)
        for (a, b), (strength, kind) in zip(graph.edge_links, graph.edges, strict=True)
        if kind == similarity
    }


def test_connections_are_the_strongest_kernels():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)
    )
    graph = neuron_graph(network, find_neurons(network), connections=2, similar=0)
    strength = network[2].weight.detach().abs().sum((2, 3)).numpy()  # (2, 3)
    expected = {}
    for receiver in range(2):
        for sender in np.argsort(-strength[receiver])[:2]:
            expected[(int(sender), 3 + receiver)] = strength[receiver, sender] / strength.max()
    found = links_of(graph, similarity=False)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6)


def test_flattened_images_join_each_channel_with_all_its_pixels():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        network[2].weight.fill_(0.01)
        network[2].weight[1, 36:] = 1.0
    graph = neuron_graph(network, find_neurons(network), connections=1, similar=0)
    assert (1, 3) in links_of(graph, similarity=False)


def test_similar_neurons_of_a_layer_are_linked():
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    )
    with torch.no_grad():
        network[2].weight.zero_()
        network[2].weight[0, 0] = 1
        network[2].weight[1, 0] = 2  # the same direction as channel 0
        network[2].weight[2, 1] = 1
    found = links_of(neuron_graph(network, find_neurons(network), similar=2), similarity=True)
    assert (3, 4) in found
    assert (4, 3) in found
    assert not any(5 in pair for pair in found)
    assert not any(a == b for a, b in found)


def test_a_residual_sum_links_to_the_layers_that_were_added(network_of):
    network = network_of("resnet18")
    neurons = find_neurons(network)
    graph = neuron_graph(network, neurons, connections=64, similar=0)
    reader = neurons.index("layer1.1.conv1[0]")
    senders = {neurons.layers[neurons.layer_index[a]].name for a, b in graph.edge_links if b == reader}
    assert senders == {"conv1", "layer1.0.conv2"}


def test_bounds(network_of):
    network = network_of("preact_resnet18")
    neurons = find_neurons(network)
    graph = neuron_graph(network, neurons, connections=3, similar=2)
    assert len(graph.edges) <= max_edges(len(neurons), 3, 2)
    assert graph.edges.min() >= 0
    assert graph.edges.max() <= 1
    assert graph.edge_links.max() < len(neurons)
    counts = np.bincount(graph.edge_links[graph.edges[:, 1] == 0][:, 1])
    assert counts.max() <= 3


def test_input_strengths_of_a_concatenation_are_of_the_part_that_each_channel_is_of():
    network = tiny("densenet")
    neurons = find_neurons(network)
    layer = next(layer for layer in neurons.layers if layer.name == "features.denseblock1.denselayer2.norm1")
    writers = (network.features.conv0, network.features.denseblock1.denselayer1.conv2)
    expected = torch.cat([conv.weight.detach().abs().sum((1, 2, 3)) for conv in writers]).numpy()
    np.testing.assert_allclose(input_strengths(network, neurons)[layer.neurons], expected / expected.max(), rtol=1e-5)


class NormalisedAttention(nn.Module):
    """A batch normalisation of what no layer gives: attention of pixels by themselves."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, images):
        pixels = self.conv(images).flatten(2).transpose(1, 2)
        attended = (pixels @ pixels.transpose(1, 2)).softmax(-1) @ pixels.tanh()
        return self.head(self.norm(attended.transpose(1, 2).reshape(len(images), 4, 6, 6)).mean((2, 3)))


def test_a_layer_that_none_feeds_has_no_edges_to_itself():
    network = NormalisedAttention().eval()
    neurons = find_neurons(network, torch.rand(2, 3, 6, 6))
    unfed = [layer for layer in neurons.layers if not layer.feeders]
    graph = neuron_graph(network, neurons)
    assert unfed
    for layer in unfed:
        places = np.arange(layer.start, layer.start + layer.size)
        assert not (np.isin(graph.edge_links, places).all(axis=1)).any()
