from dataclasses import replace

import pytest
import torch
from torch import nn

from backdoor_gym.analysis.bn_evidence import IMAGES, STEPS, Correction, find_bn_evidence, find_correction
from backdoor_gym.analysis.features import neuron_features
from backdoor_gym.analysis.suspected_target import suspect_target
from backdoor_gym.analysis.trigger_inversion import invert_trigger
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.models.training import augment
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


@pytest.fixture
def trained_on(network_of):
    """A network with the BN statistics of some images, as its neurons."""

    def make(images: torch.Tensor) -> nn.Module:
        network = network_of("small_cnn", blocks=2)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()
        with torch.no_grad():
            network(images)
        return find_neurons(network.eval())

    return make


@pytest.fixture
def clean() -> tuple[torch.Tensor, torch.Tensor]:
    """Images with room above and below, no more than are looked at."""
    generator = torch.Generator().manual_seed(0)
    return 0.2 + 0.6 * torch.rand(IMAGES, 1, 8, 8, generator=generator), torch.arange(IMAGES) % 10


@pytest.mark.parametrize("kind", list(STEPS))
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_what_was_done_to_the_images_of_training_is_found(trained_on, clean, kind, steps):
    images, labels = clean
    images = images - images.min() if kind == "black" else images  # a ground that is nearly black
    correction = Correction(kind, steps * STEPS[kind])
    neurons = trained_on(correction(images))
    assert find_correction(neurons, images, labels) == correction
    assert find_correction(trained_on(images), images, labels) == Correction()


def test_corrections_are_what_they_are_called():
    images = torch.tensor([0.0, 0.03, 0.5, 0.99])
    assert Correction()(images) is images
    assert Correction("brighter", 0.02)(images).tolist() == pytest.approx([0.02, 0.05, 0.52, 1.0])
    assert Correction("darker", 0.02)(images).tolist() == pytest.approx([0.0, 0.01, 0.48, 0.97])
    assert Correction("black", 0.04)(images).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.99])


def test_the_black_borders_of_random_crops_are_not_taken_for_darkness(trained_on, clean):
    images, labels = clean
    neurons = trained_on(augment(images.repeat(8, 1, 1, 1), torch.Generator().manual_seed(1)))
    assert find_correction(neurons, images, labels) == Correction()
    assert find_correction(neurons, images + 0.03, labels) == Correction("darker", 0.03)


def test_a_trigger_is_found_in_images_that_are_brighter_than_those_of_training(plain_infected):
    neurons = find_neurons(plain_infected.network)
    images, labels = (plain_infected.clean.images + 0.045).clamp(0, 1), plain_infected.clean.labels
    as_they_are = invert_trigger(neurons, images, labels, suspect_target(neurons, images, labels))
    evidence = find_bn_evidence(neurons, images, labels)
    assert evidence.correction == Correction("darker", 0.045)
    assert evidence.suspected.target == plain_infected.target
    assert evidence.evidence == evidence.inverted.evidence > as_they_are.evidence + 0.1
    torch.testing.assert_close(evidence.images, (images - 0.045).clamp(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "correction", [Correction("darker", 0.03), Correction("brighter", 0.03), Correction("black", 0.3)]
)
def test_of_two_readings_that_of_more_evidence_is_taken(plain_infected, monkeypatch, correction):
    """Whatever the correction that is looked at too: a trigger that adds light must not be explained away by it."""
    neurons = find_neurons(plain_infected.network)
    images, labels = plain_infected.clean.images, plain_infected.clean.labels
    wanted, taken = "backdoor_gym.analysis.bn_evidence.find_correction", {}
    for found in (Correction(), correction):
        monkeypatch.setattr(wanted, lambda *_, found=found: found)
        taken[found] = find_bn_evidence(neurons, images, labels)
    monkeypatch.setattr(wanted, lambda *_: Correction())
    corrected = find_bn_evidence(neurons, correction(images), labels)
    as_they_are, either = taken[Correction()], taken[correction]
    assert as_they_are.correction == Correction()
    assert either.evidence == max(as_they_are.evidence, corrected.evidence)
    assert either.correction == (correction if corrected.evidence > as_they_are.evidence else Correction())


def test_features_are_those_of_corrected_images(plain_infected):
    clean = LabelledImages((plain_infected.clean.images + 0.045).clamp(0, 1), plain_infected.clean.labels)
    prepared = PreparedModel(replace(plain_infected, clean=clean), Preparation())
    evidence = prepared.bn_evidence
    assert evidence.correction.kind == "darker"
    assert prepared.suspected is evidence.suspected
    expected = neuron_features(
        plain_infected.network, prepared.neurons, evidence.images, clean.labels, prepared.inverted
    )
    assert (prepared.features == expected).all()
    assert torch.equal(prepared.clean.images, clean.images)  # accuracy is that on images as they are


def test_a_network_without_batch_normalisation_tells_nothing():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    victim_images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    assert find_bn_evidence(find_neurons(network), victim_images, labels) is None
