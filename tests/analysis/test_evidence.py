"""The signs of a backdoor, and what they make of it."""

from dataclasses import replace
from math import exp

import pytest
import torch
from torch import nn

from backdoor_gym.analysis import evidence as module
from backdoor_gym.analysis.bn_evidence import BNEvidence, Correction
from backdoor_gym.analysis.evidence import (
    BN_ODDS,
    BN_WEIGHT,
    LEAST_IMAGES,
    MASK_ODDS,
    MASK_WEIGHT,
    PRIOR,
    VERDICT_THRESHOLD,
    Evidence,
    find_evidence,
)
from backdoor_gym.analysis.label_inversion import LEAST_LABELS, ORDINARY, SEVERAL, LabelEvidence
from backdoor_gym.analysis.suspected_target import SuspectedTarget
from backdoor_gym.analysis.trigger_inversion import InvertedTrigger
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

from .test_label_inversion import TARGET, clean, planted


def trigger(target: int, *families: str, level: float = 0.5, count: int = 2) -> InvertedTrigger:
    images = torch.zeros(count, 1, 8, 8)
    return InvertedTrigger(target, families, images, images.repeat(len(families), 1, 1, 1), 0.1, -1.0, level)


def bn(level: float, target: int = 3) -> BNEvidence:
    """Statistics that say so much of a label."""
    suspected = SuspectedTarget(target, 0.5, 0.0, 0.1, {}, {})
    return BNEvidence(Correction(), torch.zeros(2, 1, 8, 8), suspected, trigger(target, "addition", level=level))


def label(ratio: float = 0.25, second: float = 0.5, target: int = 3) -> LabelEvidence:
    """Masks of which the smallest two are so small."""
    return LabelEvidence((target + torch.arange(5)) % 10, torch.tensor([ratio, second, 1.0, 1.0, 1.0]))


def logistic(odds: float) -> float:
    return exp(odds) / (1 + exp(odds))


def test_the_signs_are_logarithms_of_the_masks_and_what_the_statistics_say():
    assert Evidence(bn(0.4), label(0.125, 0.5)).signs == {"mask": 2.0, "bn": 0.4}


def test_a_kind_that_is_missing_gives_no_signs():
    assert Evidence(None, label(0.125, 0.5)).signs == {"mask": 2.0}
    assert Evidence(bn(0.4), None).signs == {"bn": 0.4}
    assert Evidence(None, None).signs == {}


@pytest.mark.parametrize(
    ("sign", "less", "more"),
    [
        ("mask", (bn(0.4), label(0.25, 0.5)), (bn(0.4), label(0.125, 0.5))),
        ("bn", (bn(0.1), label()), (bn(0.8), label())),
    ],
)
def test_more_of_each_sign_makes_a_backdoor_likelier(sign, less, more):
    before, after = Evidence(*less), Evidence(*more)
    changed = [name for name, value in before.signs.items() if value != pytest.approx(after.signs[name])]
    assert changed == [sign]
    assert 0 < before.probability < after.probability < 1


def test_the_probability_is_that_of_a_noisy_or_of_both_kinds():
    by_masks, by_bn = logistic(MASK_ODDS + MASK_WEIGHT), logistic(BN_ODDS + 0.4 * BN_WEIGHT)
    both = 1 - (1 - by_masks) * (1 - by_bn)
    for told, at_even_odds in (
        (Evidence(None, label()), by_masks),
        (Evidence(bn(0.4), None), by_bn),
        (Evidence(bn(0.4), label()), both),
    ):
        odds = at_even_odds / (1 - at_even_odds) * PRIOR / (1 - PRIOR)
        assert told.probability == pytest.approx(odds / (1 + odds))
    assert Evidence(None, None).probability == PRIOR


def test_either_kind_is_enough_and_neither_speaks_against_the_other():
    strong, weak = (bn(1.0), label(0.1, 0.9)), (bn(0.0), label(1.0, 1.0))
    assert Evidence(strong[0], None).probability >= VERDICT_THRESHOLD
    assert Evidence(None, strong[1]).probability >= VERDICT_THRESHOLD
    assert Evidence(*weak).probability < VERDICT_THRESHOLD / 2
    assert Evidence(strong[0], weak[1]).probability > Evidence(strong[0], None).probability
    assert Evidence(weak[0], strong[1]).probability > Evidence(None, strong[1]).probability


def test_the_target_is_that_of_the_clearer_kind():
    masks = label(0.25, target=4)  # as clear as statistics of 0.75
    assert Evidence(bn(0.74), masks).target == 4
    assert Evidence(bn(0.76), masks).target == 3
    assert Evidence(None, masks).target == 4
    assert Evidence(bn(0.01), None).target == 3
    assert Evidence(None, None).target is None


def test_statistics_without_a_trigger_still_name_a_label():
    assert Evidence(replace(bn(0.4, target=5), inverted=None), None).target == 5


#: What the statistics say, what the masks say, and of which families the trigger is then.
SOUGHT = {
    "both point to the target": (bn(0.5), label(), ("addition", *["mask"] * SEVERAL)),
    "masks alone": (bn(0.5, target=4), label(), ("mask",) * SEVERAL),
    "no statistics": (None, label(), ("mask",) * SEVERAL),
    "no statistics, and masks point to nothing": (None, label(ORDINARY + 0.1, 1.0), ("mask",) * SEVERAL),
    "statistics alone": (bn(0.9), label(0.5, 1.0, target=4), ("addition",)),
    "masks point to nothing": (bn(0.9), label(ORDINARY + 0.1, 1.0), ("addition",)),
    "too few labels for masks": (bn(0.1), None, ("addition",)),
    "statistics without a trigger": (replace(bn(0.9), inverted=None), None, ("mask",) * SEVERAL),
}


@pytest.mark.parametrize(("statistics", "masks", "families"), SOUGHT.values(), ids=list(SOUGHT))
def test_triggers_are_of_the_kinds_that_tell_of_the_target(monkeypatch, statistics, masks, families):
    asked = []

    def invert(neurons, images, labels, target):
        asked.append(target)
        return trigger(target, *["mask"] * SEVERAL), torch.ones(SEVERAL)

    monkeypatch.setattr(module, "find_bn_evidence", lambda *_: statistics)
    monkeypatch.setattr(module, "compare_labels", lambda *_: masks)
    monkeypatch.setattr(module, "invert_label", invert)
    told = find_evidence(find_neurons(planted(True)), *clean())
    assert (told.bn, told.label, told.target) == (statistics, masks, 3)
    assert told.inverted.target == 3
    assert told.inverted.families == families
    assert len(told.inverted.images) == len(families) * len(told.inverted.clean)
    assert asked == [3] * ("mask" in families)


@pytest.mark.parametrize("target", [None, 2])
def test_without_a_label_or_images_of_others_no_trigger_is_sought(monkeypatch, target):
    monkeypatch.setattr(module, "find_bn_evidence", lambda *_: None if target is None else bn(0.5, target))
    monkeypatch.setattr(module, "compare_labels", lambda *_: None)
    monkeypatch.setattr(module, "invert_label", lambda *_: pytest.fail("a trigger was sought"))
    images, labels = clean()
    only = labels == 2
    told = find_evidence(find_neurons(planted(True)), images[only], labels[only])
    assert (told.target, told.inverted) == (target, None)


def test_a_planted_backdoor_is_likely_and_a_clean_network_is_not():
    infected, harmless = (find_evidence(find_neurons(planted(backdoor)), *clean()) for backdoor in (True, False))
    assert infected.target == TARGET
    assert infected.inverted.families == ("mask",) * SEVERAL
    assert harmless.probability < VERDICT_THRESHOLD < infected.probability


def test_trained_networks_are_told_apart(infected, plain_infected):
    for model in (infected, plain_infected):
        told = PreparedModel(model, Preparation()).evidence
        assert told.probability >= VERDICT_THRESHOLD
        assert told.target == model.target


def test_images_of_few_labels_leave_what_the_statistics_say(infected):
    few = infected.clean.labels < LEAST_LABELS - 1
    images = LabelledImages(infected.clean.images[few], infected.clean.labels[few])
    told = PreparedModel(replace(infected, clean=images), Preparation()).evidence
    assert told.label is None
    assert told.signs == {"bn": told.bn.evidence}
    assert told.probability < 1


def test_few_labels_and_no_statistics_tell_nothing():
    images, labels = clean(150)
    few = labels < LEAST_LABELS - 1
    told = find_evidence(find_neurons(planted(True)), images[few], labels[few])
    assert told == Evidence(None, None, None)
    assert told.probability == PRIOR


@pytest.mark.parametrize("count", [LEAST_IMAGES - 1, LEAST_IMAGES])
def test_few_images_tell_nothing(count):
    images, labels = clean(count)
    told = find_evidence(find_neurons(planted(True)), images, labels)
    assert told.label.target == TARGET
    assert bool(told.signs) == (count == LEAST_IMAGES)
    assert (told.probability > VERDICT_THRESHOLD) == (count == LEAST_IMAGES)


def test_a_network_that_guesses_tells_nothing(infected):
    """Of its own labels as of others: a short way to a label is no sign where every way is short."""
    images, labels = clean()
    for neurons in (find_neurons(planted(True)), find_neurons(infected.network)):
        told = find_evidence(neurons, images, labels.roll(3))
        assert (told.signs, told.probability) == ({}, PRIOR)


def test_a_network_whose_answers_have_no_derivative_is_searched_all_the_same():
    class Hard(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = planted(True)

        def forward(self, images):
            return nn.functional.one_hot(self.network(images).argmax(1), 10).float()

    told = find_evidence(find_neurons(Hard().eval()), *clean())
    assert told.label.lead < 2
    assert told.probability < VERDICT_THRESHOLD
