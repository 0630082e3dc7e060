import pytest
import torch
from torch import nn

from backdoor_gym.graph.uclc import spectral_norms, uclc
from backdoor_gym.pruning.neurons import find_neurons


def svd_norms(weight: torch.Tensor) -> torch.Tensor:
    """Largest singular value of each channel's (C_in, k*k) matrix, one at a time."""
    return torch.stack([torch.linalg.svdvals(channel.double().flatten(1))[0] for channel in weight])


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 16, 3, 3), (5, 7, 1, 1), (4, 2, 5, 5), (4, 1, 3, 3)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_spectral_norms_are_the_largest_singular_values(shape, dtype, rtol):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    norms = spectral_norms(weight)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, svd_norms(weight), rtol=rtol, atol=0)


def test_linear_rows_have_their_euclidean_norm():
    weight = torch.randn(5, 9)
    torch.testing.assert_close(spectral_norms(weight), weight.double().norm(dim=1))


def test_plain_networks_follow_the_published_formula(network_of):
    network = network_of("resnet18")
    neurons = find_neurons(network)
    bounds = {layer.name: bound for layer, bound in zip(neurons.layers, uclc(network, neurons), strict=True)}
    conv, norm = network.layer2[0].conv1, network.layer2[0].bn1
    expected = svd_norms(conv.weight) * (norm.weight.double() / norm.running_var.double().sqrt()).abs()
    torch.testing.assert_close(bounds["layer2.0.conv1"], expected.detach())


def test_the_bound_of_a_residual_sum_adds_up_all_that_writes_into_it(network_of):
    network = network_of("preact_resnet18")
    neurons = find_neurons(network)
    bounds = {layer.name: bound for layer, bound in zip(neurons.layers, uclc(network, neurons), strict=True)}
    norm = network.layer3[1].bn1
    gain = (norm.weight.double() / norm.running_var.double().sqrt()).abs()
    writers = (network.layer3[0].conv2, network.layer3[0].shortcut[0])
    expected = sum(svd_norms(conv.weight) for conv in writers) * gain
    torch.testing.assert_close(bounds["layer3.1.bn1"], expected.detach())


def test_layers_without_batch_normalisation_have_a_defined_bound():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 3))
    conv, hidden = uclc(network, find_neurons(network))
    torch.testing.assert_close(conv, svd_norms(network[0].weight).detach())
    torch.testing.assert_close(hidden, network[3].weight.detach().double().norm(dim=1))


def test_dead_statistics_give_a_finite_bound(network_of):
    network = network_of("resnet18")
    network.bn1.running_var.zero_()
    network.conv1.weight.data.zero_()
    assert all(torch.isfinite(bound).all() for bound in uclc(network, find_neurons(network)))
