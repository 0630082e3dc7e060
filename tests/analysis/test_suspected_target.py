import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.analysis.batch_norms import class_weights
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.analysis.suspected_target import POISON_RATE, _clearness, suspect_target
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.models.training import augment
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


def suspect(model):
    neurons = find_neurons(model.network)
    return neurons, suspect_target(neurons, model.clean.images, model.clean.labels)


def test_it_finds_the_target(infected, plain_infected):
    for model in (infected, plain_infected):
        _, suspected = suspect(model)
        assert suspected.target == model.target
        assert suspected.rise > 0.1


def test_the_means_are_those_of_triggered_images(network_of):
    """m_trigger = m_clean + (m - m_clean) / p, in the first layer by hand."""
    network = network_of("small_cnn", blocks=2)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 1, 8, 8, generator=generator)
    labels = torch.arange(50) % 10
    neurons = find_neurons(network)
    suspected = suspect_target(neurons, images, labels)
    conv, norm = network.stem[0], network.stem[1]
    with torch.no_grad():
        clean = conv(images).mean((0, 2, 3))
    first = neurons.layers[0].node
    expected = clean + (norm.running_mean - clean) / POISON_RATE
    torch.testing.assert_close(suspected.means[first], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(suspected.deviations[first], (norm.running_var + norm.eps).sqrt())


def test_the_target_is_found_although_all_images_are_brighter_and_classes_are_uneven(infected):
    labels = infected.clean.labels
    kept = torch.cat([torch.nonzero(labels != 7).flatten(), torch.nonzero(labels == 7).flatten()[:3]])
    images = (infected.clean.images[kept] + 0.04).clamp(0, 1)
    neurons = find_neurons(infected.network)
    assert suspect_target(neurons, images, labels[kept]).target == infected.target


def test_augmentation_is_not_taken_for_a_trigger(network_of):
    """BN statistics of cropped and flipped images: what is left over for a trigger is nothing."""
    network = network_of("small_cnn", blocks=2)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(200, 1, 8, 8, generator=generator), torch.arange(200) % 10
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    shifts = []
    for seen in (augment(images, torch.Generator().manual_seed(0)), images + 0.2):
        network.train()
        with torch.no_grad():
            network(seen)
        network.eval()
        shifts.append(suspect_target(find_neurons(network), images, labels).shift)
    assert shifts[0] < 0.01
    assert shifts[1] > 0.05


def test_class_weights():
    weights = class_weights(torch.tensor([4, 4, 4, 9, 2, 2]))
    torch.testing.assert_close(weights, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]))


def test_the_clearer_reading_is_that_in_which_one_label_stands_out():
    faint, broad = torch.tensor([0.02, 0.0, 0.001]), torch.tensor([0.4, 0.3, -0.5])
    everyone = torch.ones(3, dtype=torch.bool)
    assert _clearness(faint, everyone) == pytest.approx(20)
    assert _clearness(broad, everyone) == pytest.approx(0.8)
    assert _clearness(broad, torch.tensor([False, True, True])) == pytest.approx(0.6)  # of those that images have


def test_the_network_itself_is_left_as_it_was(infected):
    before = {key: value.clone() for key, value in infected.network.state_dict().items()}
    neurons, _ = suspect(infected)
    assert all(torch.equal(value, before[key]) for key, value in infected.network.state_dict().items())
    own = neurons.graph.state_dict()
    assert all(torch.equal(own[key], before[key]) for key in own)


def test_without_batch_normalisation_the_statistics_name_no_label_and_a_trigger_is_sought_all_the_same(infected):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    model = InfectedModel(network, infected.clean)
    assert suspect(model)[1] is None
    prepared = PreparedModel(model, Preparation())
    assert prepared.suspected is None
    assert prepared.inverted is not None
    assert MaskedModel(prepared).figures(np.zeros(4, dtype=bool)).suspected_danger > 0
    statistics = [STATIC_FEATURES.index(name) for name in ("kl", "log_variance_ratio", "mean_shift")]
    assert not prepared.features[:, statistics].any()
