import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.envs.victim import Victim, VictimOptions
from backdoor_gym.graph.simulated_trigger import POISON_RATE, _clearness, class_weights, pull, simulate_trigger
from backdoor_gym.infected import InfectedModel
from backdoor_gym.pruning.neurons import find_neurons


def simulate(model):
    neurons = find_neurons(model.network)
    return neurons, simulate_trigger(neurons, model.clean.images, model.clean.labels)


def test_it_finds_the_target_and_imitates_the_trigger(infected, plain_infected):
    for model in (infected, plain_infected):
        _, simulated = simulate(model)
        assert simulated.target == model.target
        with torch.no_grad():
            logits = simulated.neurons.graph(simulated.images)
        others = simulated.labels != model.target
        assert (logits[others].argmax(1) == model.target).double().mean() > 0.5


def test_bn_inputs_get_the_mean_of_triggered_images(network_of):
    """m_trigger = m_clean + (m - m_clean) / p, in the first layer by hand."""
    network = network_of("small_cnn", blocks=2)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 1, 8, 8, generator=generator)
    labels = torch.arange(50) % 10
    simulated = simulate_trigger(find_neurons(network), images, labels)
    conv, norm = network.stem[0], network.stem[1]
    with torch.no_grad():
        clean = conv(images).mean((0, 2, 3))
    moved = simulated.neurons.graph.get_submodule("stem.1").running_mean
    # BN(x + c) is BN with the running mean less c.
    expected = norm.running_mean - (norm.running_mean - clean) / POISON_RATE
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


def test_the_target_is_found_although_all_images_are_brighter_and_classes_are_uneven(infected):
    labels = infected.clean.labels
    kept = torch.cat([torch.nonzero(labels != 7).flatten(), torch.nonzero(labels == 7).flatten()[:3]])
    images = (infected.clean.images[kept] + 0.04).clamp(0, 1)
    neurons = find_neurons(infected.network)
    assert simulate_trigger(neurons, images, labels[kept]).target == infected.target


def test_class_weights():
    weights = class_weights(torch.tensor([4, 4, 4, 9, 2, 2]))
    torch.testing.assert_close(weights, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]))


def test_the_clearer_reading_is_that_in_which_one_label_stands_out():
    faint, broad = torch.tensor([0.02, 0.0, 0.001]), torch.tensor([0.4, 0.3, -0.5])
    assert _clearness(faint) == pytest.approx(20)
    assert _clearness(broad) == pytest.approx(0.8)


def test_the_network_itself_is_left_as_it_was(infected):
    before = {key: value.clone() for key, value in infected.network.state_dict().items()}
    neurons, simulated = simulate(infected)
    pull(simulated)
    assert all(torch.equal(value, before[key]) for key, value in infected.network.state_dict().items())
    own = neurons.graph.state_dict()
    assert all(torch.equal(own[key], before[key]) for key in own)


def test_pull_is_the_derivative_by_the_mask(infected):
    neurons, simulated = simulate(infected)
    pulls = pull(simulated)
    layer = neurons.layers[1]

    def towards(value):
        masks = [torch.ones(one.size) for one in neurons.layers]
        masks[1][2] = value
        with torch.no_grad():
            logits = simulated.neurons.graph(simulated.images, *masks)
        return (logits[:, simulated.target] - logits.mean(1)).mean().item()

    slope = (towards(1.01) - towards(0.99)) / 0.02
    assert pulls[layer.start + 2].item() == pytest.approx(slope, abs=1e-3, rel=0.05)


def test_pruning_what_pulls_most_makes_the_real_trigger_fail(infected):
    """The derivative under the simulated trigger points at neurons that carry the real one."""
    victim = Victim(infected, VictimOptions())
    order = np.argsort(-pull(victim.simulated).numpy())
    dangers = []
    for chosen in (order[:12], order[50:62]):
        pruned = np.zeros(len(victim), dtype=bool)
        pruned[chosen] = True
        dangers.append(victim.figures(pruned).danger)
    assert dangers[0] < dangers[1] - 0.2


def test_without_batch_normalisation_nothing_can_be_simulated(infected):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    model = InfectedModel(network, infected.clean)
    assert simulate(model)[1] is None
    victim = Victim(model, VictimOptions())
    assert victim.figures(np.zeros(4, dtype=bool)).suspected_danger == 0
    assert not victim.features[:, 9].any()
