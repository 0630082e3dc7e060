import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.analysis import label_inversion
from backdoor_gym.analysis.features import pull
from backdoor_gym.analysis.label_inversion import BATCH, FEW, MOST_LABELS, SMALLEST, STEPS, invert_by_label
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


@pytest.fixture
def searches(monkeypatch):
    """The labels, images of a label, and steps of each search."""
    begun = []
    kind = label_inversion._MaskSearch
    go = kind.go

    def watched(self, steps, last):
        begun.append((self._sought.tolist(), self._batch, steps))
        return go(self, steps, last)

    monkeypatch.setattr(kind, "go", watched)
    return begun


def test_the_label_with_a_short_way_to_it_is_found_and_what_carries_it():
    neurons = find_neurons(planted(True))
    images, labels = clean()
    evidence = invert_by_label(neurons, images, labels)
    inverted = evidence.inverted
    assert evidence.target == inverted.target == TARGET
    assert evidence.labels.tolist() == list(range(10))
    assert int(evidence.sizes.argmin()) == TARGET
    assert inverted.families == ("mask",)
    assert (labels[:60] != TARGET).sum() == len(inverted.clean) == len(inverted.images)
    given = (neurons.graph(inverted.images).argmax(1) == TARGET).float().mean().item()
    assert given == evidence.success > 0.9
    assert int(pull(neurons, inverted).argmax()) == 10
    assert inverted.error == pytest.approx(np.log10(evidence.ratio))


def test_the_mask_is_where_the_trigger_was_planted():
    inverted = invert_by_label(find_neurons(planted(True)), *clean()).inverted
    change = (inverted.images - inverted.clean).abs().mean((0, 1)).flatten()
    assert set(change.topk(4).indices.tolist()) == set(CORNER)
    assert change[CORNER].sum() > 0.9 * change.sum()
    assert inverted.size == pytest.approx(change.mean().item(), rel=1e-5)


def test_without_a_backdoor_no_mask_is_far_smaller_than_the_others():
    infected, harmless = (invert_by_label(find_neurons(planted(backdoor)), *clean()) for backdoor in (True, False))
    assert infected.ratio < 0.05
    assert infected.second > 0.5
    assert 0.3 < harmless.ratio <= harmless.second <= 1


def test_a_label_without_clean_images_is_never_named():
    images, labels = clean()
    others = labels != TARGET
    evidence = invert_by_label(find_neurons(planted(True)), images[others], labels[others])
    assert evidence.labels.tolist() == [label for label in range(10) if label != TARGET]
    assert evidence.target != TARGET


@pytest.mark.parametrize("count", [10, 13])
def test_an_image_of_a_label_is_enough(count):
    evidence = invert_by_label(find_neurons(planted(True)), *clean(count))
    assert evidence.target == TARGET
    assert evidence.ratio < 0.05
    assert len(evidence.inverted.clean) == count - 1


def test_of_many_labels_only_the_smallest_and_others_for_the_median_are_searched_to_the_end(monkeypatch, searches):
    monkeypatch.setattr(label_inversion, "MOST_LABELS", 4)
    monkeypatch.setattr(label_inversion, "SMALLEST", 2)
    assert invert_by_label(find_neurons(planted(True)), *clean()).target == TARGET
    (first, few, steps), (kept, usual, all_steps) = searches
    assert (first, few, steps) == (list(range(10)), FEW, label_inversion.SHORT_STEPS)
    assert (len(kept), usual, all_steps) == (len(set(kept)), BATCH, STEPS) == (4, BATCH, STEPS)
    assert kept[0] == TARGET


def test_the_others_are_spread_over_the_rest():
    sizes = torch.arange(100.0).flip(0)
    kept = label_inversion._smallest_and_others(sizes)
    assert len(kept) == len(set(kept.tolist())) == MOST_LABELS
    assert kept[:SMALLEST].tolist() == list(range(99, 99 - SMALLEST, -1))
    assert sizes[kept[SMALLEST:]].tolist() == [6, 25, 43, 62, 80, 99]


def test_few_images_are_taken_where_a_pass_is_large(monkeypatch, searches):
    neurons, (images, labels) = find_neurons(planted(True)), clean()
    invert_by_label(neurons, images, labels)
    monkeypatch.setattr(label_inversion, "LARGE", 100)
    assert invert_by_label(neurons, images, labels).target == TARGET
    assert searches == [(list(range(10)), batch, STEPS) for batch in (BATCH, FEW)]


def test_the_same_network_and_images_give_the_same_masks():
    neurons, (images, labels) = find_neurons(planted(True)), clean()
    torch.manual_seed(1)
    first = invert_by_label(neurons, images, labels)
    torch.manual_seed(2)
    second = invert_by_label(neurons, images, labels)
    assert torch.equal(first.sizes, second.sizes)
    assert torch.equal(first.inverted.images, second.inverted.images)


def test_images_of_one_label_tell_nothing():
    images, labels = clean()
    one = labels == 2
    assert invert_by_label(find_neurons(planted(True)), images[one], labels[one]) is None


def test_a_victim_without_batch_normalisation_is_read_by_it():
    prepared = PreparedModel(InfectedModel.from_module(planted(True), clean()), Preparation())
    assert prepared.bn_evidence is None
    assert prepared.inverted.target == prepared.evidence.target == TARGET
    assert prepared.evidence.probability > 0.9
    assert int(prepared.first_gradients.pull.argmax()) == 10
    assert np.isfinite(prepared.features).all()
