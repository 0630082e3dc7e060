import pytest
import torch
from torch import nn

from backdoor_gym.analysis.uclc import spectral_norms, uclc
from backdoor_gym.neurons.finding import find_neurons

from ..conftest import settle
from ..tiny import tiny


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


def bounds_of(network: nn.Module) -> dict[str, torch.Tensor]:
    neurons = find_neurons(network)
    return {layer.name: bound for layer, bound in zip(neurons.layers, uclc(network, neurons), strict=True)}


def dense_norms(conv: nn.Conv2d) -> torch.Tensor:
    """Of a grouped convolution: each kernel put among zeros for the channels of other groups, one at a time."""
    outputs, inputs = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    norms = []
    for channel, kernel in enumerate(conv.weight.detach().double()):
        matrix = torch.zeros(conv.in_channels, kernel[0].numel(), dtype=torch.float64)
        group = channel // outputs
        matrix[group * inputs : (group + 1) * inputs] = kernel.flatten(1)
        norms.append(torch.linalg.svdvals(matrix)[0])
    return torch.stack(norms)


@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_and_depthwise_kernels_read_their_group_alone(groups):
    network = settle(
        nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=groups), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 3),
        )
    )  # fmt: skip
    gain = network[3].weight.double().abs() / network[3].running_var.double().sqrt()
    torch.testing.assert_close(bounds_of(network)["2"], (dense_norms(network[2]) * gain).detach())


def test_a_concatenation_has_the_bound_of_the_part_that_each_channel_is_of():
    network = tiny("densenet")
    block = network.features.denseblock1
    norm = block.denselayer3.norm1
    gain = (norm.weight.double() / norm.running_var.double().sqrt()).abs()
    writers = (network.features.conv0, block.denselayer1.conv2, block.denselayer2.conv2)
    expected = torch.cat([svd_norms(conv.weight) for conv in writers]) * gain
    torch.testing.assert_close(bounds_of(network)["features.denseblock1.denselayer3.norm1"], expected.detach())


def test_layer_normalisation_scales_what_reads_it_and_the_channels_that_it_is_of():
    transformer = bounds_of(tiny("vit"))["encoder.layers.encoder_layer_1.mlp.0"]
    block = tiny("vit").encoder.layers.encoder_layer_1
    expected = [(row * block.ln_2.weight).double().norm() for row in block.mlp[0].weight]
    torch.testing.assert_close(transformer, torch.stack(expected).detach())

    convnext = tiny("convnext")
    conv, norm, hidden = (convnext.features[1][0].block[index] for index in (0, 2, 3))
    bounds = bounds_of(convnext)
    torch.testing.assert_close(bounds["features.1.0.block.0"], (svd_norms(conv.weight) * norm.weight.double()).detach())
    torch.testing.assert_close(bounds["features.1.0.block.3"], hidden.weight.detach().double().norm(dim=1))


def test_the_bound_behind_a_layer_normalisation_holds_on_the_sphere_it_gives():
    """Of inputs that have one standard deviation, as tokens of one scale have, no pair is farther apart than the bound says."""
    block = tiny("vit").encoder.layers.encoder_layer_0
    bound = bounds_of(tiny("vit"))["encoder.layers.encoder_layer_0.mlp.0"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    y = x + 1e-3 * torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        gaps = (block.mlp[0](block.ln_2(x)) - block.mlp[0](block.ln_2(y))).abs().double()
    ratios = gaps / (x - y).norm(dim=1, keepdim=True)
    assert (ratios.max(0).values <= 1.01 * bound).all()
    assert (ratios.max(0).values > 0.2 * bound).all()


def test_group_normalisation_scales_the_channels_that_it_is_of():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    nn.init.normal_(network[1].weight)
    expected = svd_norms(network[0].weight) * network[1].weight.double().abs()
    torch.testing.assert_close(bounds_of(network)["0"], expected.detach())


def test_a_layer_used_twice_has_the_bound_of_one_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.hidden, self.linear = nn.Linear(64, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.linear(self.hidden(self.hidden(self.stem(x.flatten(1)).relu()).relu()).relu())

    network = Twice()
    torch.testing.assert_close(bounds_of(network)["hidden"], network.hidden.weight.detach().double().norm(dim=1))
