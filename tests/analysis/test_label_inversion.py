import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.analysis import label_inversion
from backdoor_gym.analysis.features import pull
from backdoor_gym.analysis.label_inversion import (
    BATCH,
    BEGIN,
    FEW,
    LEAST_LABELS,
    LONG_STEPS,
    MOST_LABELS,
    ORDINARY,
    SEVERAL,
    SMALLEST,
    STEPS,
    LabelEvidence,
    compare_labels,
    invert_label,
)
from backdoor_gym.masking.export import write_mask
from backdoor_gym.metrics import danger
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

#: The planted label, where its trigger is, and the unit that carries it.
TARGET, CORNER, CARRIER = 7, [54, 55, 62, 63], 10


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


def without(neurons, network, unit):
    """The network without a unit."""
    mask = np.ones(len(neurons), dtype=bool)
    mask[unit] = False
    return write_mask(network, neurons, mask)


def test_the_label_with_a_short_way_to_it_is_named():
    evidence = compare_labels(find_neurons(planted(True)), *clean())
    assert evidence.target == TARGET
    assert evidence.labels.tolist() == list(range(10))
    assert int(evidence.sizes.argmin()) == TARGET


def test_several_masks_give_the_label_and_show_what_carries_it():
    neurons, (images, labels) = find_neurons(planted(True)), clean()
    inverted, sizes = invert_label(neurons, images, labels, TARGET)
    assert (inverted.target, inverted.families) == (TARGET, ("mask",) * SEVERAL)
    foreign = images[labels != TARGET][: label_inversion.SHOWN_ON]
    assert torch.equal(inverted.clean, foreign)
    assert len(inverted.images) == SEVERAL * len(foreign)
    given = (neurons.graph(inverted.images).argmax(1) == TARGET).float().view(SEVERAL, -1).mean(1)
    assert (given > 0.85).all()
    assert inverted.evidence == pytest.approx(danger(neurons.graph(inverted.images), TARGET), abs=1e-5)
    assert inverted.evidence > 0.75
    assert int(pull(neurons, inverted).argmax()) == CARRIER
    assert (sizes < 0.1 * compare_labels(neurons, images, labels).median).all()


def test_the_mask_is_where_the_trigger_was_planted():
    inverted, _ = invert_label(find_neurons(planted(True)), *clean(), TARGET)
    stamped = inverted.images.view(SEVERAL, len(inverted.clean), -1)
    changes = (stamped - inverted.clean.flatten(1)).abs().mean(1)
    for change in changes:
        assert set(change.topk(4).indices.tolist()) == set(CORNER)
        assert change[CORNER].sum() > 0.9 * change.sum()
    assert inverted.size == pytest.approx(changes.mean().item(), rel=1e-5)


def test_without_a_backdoor_no_mask_is_far_smaller_than_the_others():
    infected, harmless = (compare_labels(find_neurons(planted(backdoor)), *clean()) for backdoor in (True, False))
    assert infected.ratio < 0.05
    assert infected.lead > 10
    assert infected.points_to(TARGET)
    assert not infected.points_to(TARGET + 1)
    assert 0.3 < harmless.ratio <= 1 <= harmless.lead < 2


def test_an_ordinary_mask_points_to_no_label():
    sizes = torch.tensor([1.0, ORDINARY - 0.01, 1.0, 1.0, 2.0])
    below = LabelEvidence(torch.arange(5, 10), sizes)
    assert (below.target, below.median) == (6, 1.0)
    assert below.lead == pytest.approx(1 / (ORDINARY - 0.01))
    assert below.ratio == pytest.approx(ORDINARY - 0.01)
    assert [below.points_to(label) for label in range(5, 10)] == [False, True, False, False, False]
    above = LabelEvidence(torch.arange(5, 10), sizes.clamp(min=ORDINARY + 0.01))
    assert above.target == 6
    assert not above.points_to(6)


def test_a_label_without_clean_images_is_never_named():
    images, labels = clean()
    others = labels != TARGET
    evidence = compare_labels(find_neurons(planted(True)), images[others], labels[others])
    assert evidence.labels.tolist() == [label for label in range(10) if label != TARGET]
    assert evidence.target != TARGET


@pytest.mark.parametrize("count", [10, 13])
def test_an_image_of_a_label_is_enough(count):
    neurons, (images, labels) = find_neurons(planted(True)), clean(count)
    evidence = compare_labels(neurons, images, labels)
    assert evidence.target == TARGET
    assert evidence.ratio < 0.05
    inverted, sizes = invert_label(neurons, images, labels, TARGET)
    assert len(inverted.clean) == count - 1
    assert (sizes < ORDINARY * evidence.median).all()


def test_few_labels_are_not_compared():
    """Of two or three masks the smallest is smaller than the median in any network."""
    neurons, (images, labels) = find_neurons(planted(True)), clean()
    for count in range(1, LEAST_LABELS + 1):
        few = labels > 9 - count
        evidence = compare_labels(neurons, images[few], labels[few])
        assert (evidence is None) == (count < LEAST_LABELS)
    assert evidence.labels.tolist() == list(range(10 - LEAST_LABELS, 10))


def test_of_many_labels_only_the_smallest_and_others_for_the_median_are_searched_to_the_end(monkeypatch, searches):
    monkeypatch.setattr(label_inversion, "MOST_LABELS", 4)
    monkeypatch.setattr(label_inversion, "SMALLEST", 2)
    assert compare_labels(find_neurons(planted(True)), *clean()).target == TARGET
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
    compare_labels(neurons, images, labels)
    invert_label(neurons, images, labels, TARGET)
    monkeypatch.setattr(label_inversion, "LARGE", 100)
    assert compare_labels(neurons, images, labels).target == TARGET
    invert_label(neurons, images, labels, TARGET)
    assert searches == [
        search
        for batch in (BATCH, FEW)
        for search in ((list(range(10)), batch, STEPS), ([TARGET] * SEVERAL, batch, LONG_STEPS))
    ]


def test_the_same_network_and_images_give_the_same_masks():
    neurons, (images, labels) = find_neurons(planted(True)), clean()
    torch.manual_seed(1)
    first, (inverted, sizes) = compare_labels(neurons, images, labels), invert_label(neurons, images, labels, TARGET)
    torch.manual_seed(2)
    second, (again, same) = compare_labels(neurons, images, labels), invert_label(neurons, images, labels, TARGET)
    assert torch.equal(first.sizes, second.sizes)
    assert torch.equal(sizes, same)
    assert torch.equal(inverted.images, again.images)
    other, _ = invert_label(neurons, images, labels, TARGET, seed=1)
    assert not torch.equal(inverted.images, other.images)


def test_the_first_mask_begins_at_zero_and_the_others_apart(monkeypatch):
    begun = []
    kind = label_inversion._MaskSearch
    monkeypatch.setattr(kind, "go", lambda self, *_: begun.append((self._mask, self._pattern)) or torch.ones(SEVERAL))
    neurons = find_neurons(planted(True))
    for seed in (0, 1):
        invert_label(neurons, *clean(), TARGET, seed=seed)
    for masks, patterns in begun:
        assert (masks[0] == BEGIN).all()
        assert (patterns[0] == 0).all()
        for starts in (masks - BEGIN, patterns):
            assert 0.5 < starts[1:].std() < 1.5
            apart = torch.pdist(starts.detach().flatten(1))
            assert (apart > 1).all()
    assert not torch.equal(begun[0][0][1:], begun[1][0][1:])


def test_labels_that_are_compared_begin_alike(monkeypatch):
    begun = []
    kind = label_inversion._MaskSearch
    monkeypatch.setattr(kind, "go", lambda self, *_: begun.append((self._mask, self._pattern)) or torch.ones(10))
    compare_labels(find_neurons(planted(True)), *clean())
    ((masks, patterns),) = begun
    assert (masks == BEGIN).all()
    assert (patterns == 0).all()


def test_masks_are_sought_in_a_pruned_network():
    network, (images, labels) = planted(True), clean()
    neurons = find_neurons(network)
    median = compare_labels(neurons, images, labels).median
    pruned = without(neurons, network, CARRIER)
    whole, small = invert_label(neurons, images, labels, TARGET)
    inverted, sizes = invert_label(neurons, images, labels, TARGET, pruned)
    assert small.max() < ORDINARY * median < sizes.min()
    assert torch.equal(inverted.clean, whole.clean)
    assert inverted.evidence == pytest.approx(danger(pruned(inverted.images), TARGET), abs=1e-5)
    harmless = without(neurons, network, 0)
    assert invert_label(neurons, images, labels, TARGET, harmless)[1].max() < ORDINARY * median


def test_a_victim_without_batch_normalisation_is_read_by_it():
    prepared = PreparedModel(InfectedModel.from_module(planted(True), clean()), Preparation())
    assert prepared.bn_evidence is None
    assert prepared.inverted.target == prepared.evidence.target == TARGET
    assert prepared.evidence.probability > 0.9
    assert int(prepared.first_gradients.pull.argmax()) == CARRIER
    assert np.isfinite(prepared.features).all()
