import pytest
import torch
from torch import nn

from backdoor_gym.analysis.features import standardise
from backdoor_gym.analysis.uclc import bounds, uclc
from backdoor_gym.analysis.uclc_penalty import UCLCPenalty
from backdoor_gym.models.infecting import infect
from backdoor_gym.models.training import Schedule
from backdoor_gym.neurons.finding import find_neurons


def test_the_penalty_is_what_stands_out_of_each_layer(network_of):
    network = network_of("small_cnn", blocks=2)
    expected = []
    for layer in uclc(network, find_neurons(network)):
        threshold = layer.mean() + 1.0 * layer.std(correction=0)
        expected.append(sum(max(0.0, (bound - threshold).item()) for bound in layer) / layer.mean().item())
    penalty = UCLCPenalty(weight=2.0, margin=1.0)(network)()
    assert penalty.item() == pytest.approx(2 * sum(expected) / len(expected))
    assert penalty > 0


@pytest.mark.parametrize("shape", ["plain", "preact"])
def test_bounds_have_the_derivatives_of_the_weights(network_of, shape):
    network = network_of("small_cnn", blocks=2, shape=shape)
    neurons = find_neurons(network)
    for weight in (network.blocks[0].conv1.weight if shape == "preact" else network.blocks[0].conv.weight,):
        (gradient,) = torch.autograd.grad(sum(layer.sum() for layer in bounds(network, neurons)), weight)
        before, step = sum(layer.sum() for layer in uclc(network, neurons)), 1e-3 * gradient / gradient.norm()
        with torch.no_grad():
            weight += step
        after = sum(layer.sum() for layer in uclc(network, neurons))
        assert (after - before).item() == pytest.approx((gradient * step).sum().item(), rel=0.02)


@pytest.mark.slow
def test_an_attacker_who_knows_clp_leaves_no_outlier():
    def make(penalty):
        return infect(
            "digits",
            "small_cnn",
            "badnets",
            seed=1,
            schedule=Schedule(epochs=6, batch_size=64, learning_rate=0.05, augment=False),
            architecture_options={"width": 32, "blocks": 2},
            clean_images=100,
            penalty=penalty,
        )

    plain, adapted = make(None), make(UCLCPenalty())
    largest = [
        max(standardise(layer).max().item() for layer in uclc(model.network, find_neurons(model.network)))
        for model in (plain, adapted)
    ]
    assert largest[1] < 2 < largest[0]
    assert adapted.facts["asr"] > 0.9
    assert adapted.facts["acc"] > plain.facts["acc"] - 0.03
    assert "UCLCPenalty" in adapted.facts["penalty"]


def test_kernels_of_zeros_have_a_gradient():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )
    with torch.no_grad():
        network[0].weight[1] = 0
        network[2].weight.zero_()
    penalty = UCLCPenalty()(network)()
    penalty.backward()
    assert torch.isfinite(penalty)
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters() if parameter.grad is not None)
