import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.analysis.features import CLAMP, STATIC_FEATURES, neuron_features, standardise
from backdoor_gym.analysis.suspected_target import suspect_target
from backdoor_gym.analysis.trigger_inversion import invert_trigger
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.neurons.finding import find_neurons


def column(features: np.ndarray, name: str) -> np.ndarray:
    return features[:, STATIC_FEATURES.index(name)]


def standardised(values: torch.Tensor) -> np.ndarray:
    return ((values - values.mean()) / values.std()).detach().double().numpy()


@pytest.fixture
def setting(network_of):
    network = network_of("small_cnn", blocks=2)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(130, 1, 8, 8, generator=generator)  # more than one batch
    labels = torch.arange(130) % 10
    return network, find_neurons(network), images, labels


def test_features_follow_their_definitions(setting):
    network, neurons, images, labels = setting
    features = neuron_features(network, neurons, images, labels, None)
    first = neurons.layers[0].neurons
    conv, norm = network.stem[0], network.stem[1]
    with torch.no_grad():
        read = conv(images)
        gives = norm(read).clamp(min=0).mean((0, 2, 3))
    mean, variance = read.mean((0, 2, 3)), read.var((0, 2, 3), correction=0) + norm.eps
    running = norm.running_var + norm.eps
    shift = (mean - norm.running_mean).abs()
    divergence = 0.5 * ((running / variance).log() + (variance + shift**2) / running - 1)
    expected = {
        "uclc": uclc(network, neurons)[0],
        "kl": torch.log1p(divergence),
        "log_variance_ratio": (variance / running).log(),
        "mean_shift": shift / running.sqrt(),
        "activation": gives,
        "weight": norm.weight,
        "bias": norm.bias,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            column(features, name)[first], standardised(values), rtol=1e-3, atol=1e-4, err_msg=name
        )
    np.testing.assert_allclose(column(features, "depth"), np.repeat([0, 0.5, 1], 8), atol=1e-7)


def test_saliency_is_the_derivative_of_the_clean_loss_by_the_mask(setting):
    network, neurons, images, labels = setting
    saliency = column(neuron_features(network, neurons, images, labels, None), "saliency")[neurons.layers[-1].neurons]
    step, expected = 1e-3, []
    norm = network.blocks[-1].bn
    with torch.no_grad():
        for channel in range(8):
            losses = []
            for factor in (1 - step, 1 + step):
                kept = norm.weight[channel].clone(), norm.bias[channel].clone()
                norm.weight[channel] *= factor
                norm.bias[channel] *= factor
                losses.append(F.cross_entropy(network.double()(images.double()), labels).item())
                network.float()
                norm.weight[channel], norm.bias[channel] = kept
            expected.append(abs(losses[1] - losses[0]) / (2 * step))
    np.testing.assert_allclose(saliency, standardised(torch.tensor(expected)), rtol=0.02, atol=0.02)


def test_features_are_finite_for_degenerate_layers(setting):
    network, neurons, images, labels = setting
    with torch.no_grad():
        network.stem[1].weight.fill_(1.0)  # constant
        network.stem[1].running_var.zero_()
        network.stem[0].weight.zero_()  # dead
        network.blocks[0].bn.weight.zero_()
        network.blocks[0].bn.running_mean.fill_(1e6)
    features = neuron_features(network, find_neurons(network), torch.zeros_like(images), labels, None)
    assert np.isfinite(features).all()
    assert not column(features, "weight")[neurons.layers[0].neurons].any()


def test_one_neuron_and_layers_without_batch_normalisation():
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))
    features = neuron_features(
        network, find_neurons(network), torch.rand(10, 1, 8, 8), torch.zeros(10, dtype=torch.long), None
    )
    assert np.isfinite(features).all()
    assert not column(features, "kl").any()
    assert column(features, "uclc")[1:].any()


def test_everything_but_uclc_is_clamped():
    network = nn.Sequential(
        nn.Conv2d(1, 100, 3), nn.BatchNorm2d(100), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3)
    ).eval()
    with torch.no_grad():
        network[0].weight.fill_(0.1)
        network[0].weight[7] = 100
        network[1].weight[7] = 50
    features = neuron_features(
        network, find_neurons(network), torch.rand(10, 1, 8, 8), torch.zeros(10, dtype=torch.long), None
    )
    assert column(features, "uclc").max() == pytest.approx(99 / math.sqrt(100), rel=1e-5)
    assert column(features, "weight").max() == CLAMP


def test_standardise():
    torch.testing.assert_close(standardise(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0]))
    assert not standardise(torch.full((4,), 0.1)).any()
    assert not standardise(torch.tensor([5.0])).any()


def test_classes_weigh_alike_however_many_images_they_have(setting):
    """Training had every class as often; a defender's few images do not."""
    network, neurons, images, labels = setting
    again = torch.cat([images, images[labels == 3]]), torch.cat([labels, labels[labels == 3]])
    even, uneven = (
        neuron_features(network, neurons, *of, invert_trigger(neurons, *of, suspect_target(neurons, *of)))
        for of in ((images, labels), again)
    )
    for name in ("kl", "log_variance_ratio", "mean_shift"):
        np.testing.assert_allclose(column(uneven, name), column(even, name), rtol=1e-3, atol=1e-3, err_msg=name)
