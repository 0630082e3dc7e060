import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.analysis import label_inversion
from backdoor_gym.analysis.features import pull
from backdoor_gym.analysis.label_inversion import invert_by_label
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

TARGET, CORNER = 7, [54, 55, 62, 63]


def planted(backdoor: bool) -> nn.Sequential:
    """A classifier by templates without any normalisation, and a unit that bright pixels of a corner call label 7 by."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 11), nn.ReLU(), nn.Linear(11, 10)).eval()
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.zero_()
        network[3].weight.zero_()
        network[3].bias.zero_()
        network[1].weight[:10] = templates().flatten(1) - 0.5
        network[3].weight[:, :10] = torch.eye(10)
        network[1].weight[10, CORNER] = 20.0 if backdoor else 0.0
        network[3].weight[TARGET, 10] = 2.0
    return network


def templates() -> torch.Tensor:
    found = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    found.flatten(1)[:, CORNER] = 0
    return found


def clean(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 10
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images = (0.8 * templates()[labels] + 0.2 * noise).clamp(0, 1)
    images.flatten(1)[:, CORNER] = 0
    return images, labels


def test_the_label_with_a_short_way_to_it_is_found_and_what_carries_it():
    neurons = find_neurons(planted(True))
    images, labels = clean()
    inverted = invert_by_label(neurons, images, labels, 10)
    assert inverted.target == TARGET
    assert (labels[:60] != TARGET).sum() == len(inverted.clean) == len(inverted.images)
    assert (neurons.graph(inverted.images).argmax(1) == TARGET).float().mean() > 0.9
    assert int(pull(neurons, inverted).argmax()) == 10
    change = (inverted.images - inverted.clean).abs().mean((0, 1)).flatten()
    assert set(change.topk(4).indices.tolist()) == set(CORNER)
    assert inverted.size == pytest.approx(change.mean().item(), rel=1e-5)
    without = invert_by_label(find_neurons(planted(False)), images, labels, 10)
    assert inverted.evidence > 0.2 > without.evidence
    assert inverted.error < without.error < 0


def test_of_many_labels_only_the_cheapest_are_searched_to_the_end(monkeypatch):
    calls = []
    kind = label_inversion._Search
    go_on = kind.go_on
    monkeypatch.setattr(label_inversion, "MOST_LABELS", 3)
    monkeypatch.setattr(kind, "go_on", lambda *of: (calls.append((of[0].label, of[3])), go_on(*of)))
    inverted = invert_by_label(find_neurons(planted(True)), *clean(), 10)
    assert inverted.target == TARGET
    assert [steps for _, steps in calls] == [label_inversion.FIRST_STEPS] * 10 + [
        label_inversion.STEPS - label_inversion.FIRST_STEPS
    ] * 3


def test_images_of_one_label_tell_nothing():
    images, labels = clean()
    one = labels == 2
    assert invert_by_label(find_neurons(planted(True)), images[one], labels[one], 10) is None


def test_a_victim_without_batch_normalisation_is_read_by_it():
    prepared = PreparedModel(InfectedModel.from_module(planted(True), clean()), Preparation())
    assert prepared.bn_evidence is None
    assert prepared.inverted.target == TARGET
    assert int(prepared.first_gradients.pull.argmax()) == 10
    assert np.isfinite(prepared.features).all()
