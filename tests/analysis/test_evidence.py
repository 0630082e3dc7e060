"""The signs of a backdoor, and what they make of it."""

from dataclasses import replace
from math import exp

import pytest
import torch

from backdoor_gym.analysis import evidence as module
from backdoor_gym.analysis.bn_evidence import BNEvidence, Correction
from backdoor_gym.analysis.evidence import (
    INTERCEPT,
    PROBABILITY_IF_SURE,
    SURE,
    VERDICT_THRESHOLD,
    WEIGHTS,
    Evidence,
    find_evidence,
)
from backdoor_gym.analysis.label_inversion import LabelEvidence
from backdoor_gym.analysis.suspected_target import SuspectedTarget
from backdoor_gym.analysis.trigger_inversion import InvertedTrigger
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

from .test_label_inversion import TARGET, clean, planted


def trigger(target: int, family: str, level: float = 0.5) -> InvertedTrigger:
    images = torch.zeros(2, 1, 8, 8)
    return InvertedTrigger(target, (family,), images, images, 0.1, -1.0, level)


def bn(level: float, target: int = 3) -> BNEvidence:
    """Statistics that say so much of a label."""
    suspected = SuspectedTarget(target, 0.5, 0.0, 0.1, {}, {})
    return BNEvidence(Correction(), torch.zeros(2, 1, 8, 8), suspected, trigger(target, "addition", level))


def label(ratio: float = 0.25, second: float = 0.5, target: int = 3) -> LabelEvidence:
    """Masks of which the smallest two are so small."""
    sizes = torch.tensor([ratio, second, 1.0])
    return LabelEvidence(torch.arange(3), sizes, ratio, second, 0.9, trigger(target, "mask"))


def test_the_signs_are_logarithms_of_the_masks_and_what_the_statistics_say():
    assert Evidence(bn(0.4), label()).signs == {"mask": 2.0, "gap": 1.0, "bn": 0.4, "agreement": 1.0}
    assert Evidence(bn(0.4, target=4), label()).signs["agreement"] == 0
    assert Evidence(None, label()).signs == {"mask": 2.0, "gap": 1.0, "bn": 0.0, "agreement": 0.0}
    assert Evidence(bn(0.4), None).signs == {"mask": 0.0, "gap": 0.0, "bn": 0.4, "agreement": 0.0}
    assert set(Evidence(None, None).signs) == set(WEIGHTS)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ((bn(0.4), label(0.25, 0.5)), (bn(0.4), label(0.125, 0.25))),  # mask
        ((bn(0.4), label(0.25, 0.5)), (bn(0.4), label(0.25, 0.9))),  # gap
        ((bn(0.1), label()), (bn(0.8), label())),  # bn
        ((bn(0.4, target=4), label()), (bn(0.4), label())),  # agreement
    ],
    ids=list(WEIGHTS),
)
def test_more_of_each_sign_makes_a_backdoor_likelier(less, more):
    before, after = Evidence(*less), Evidence(*more)
    changed = [name for name in WEIGHTS if before.signs[name] != pytest.approx(after.signs[name])]
    assert len(changed) == 1
    assert 0 < before.probability < after.probability < 1


def test_the_probability_is_that_of_a_logistic_regression():
    told = Evidence(bn(0.4), label())
    odds = INTERCEPT + sum(WEIGHTS[name] * value for name, value in told.signs.items())
    assert told.probability == pytest.approx(exp(odds) / (1 + exp(odds)))
    assert Evidence(None, None).probability == 0


def test_beyond_doubt_the_masks_say_nothing_more():
    """Nor is anything less certain for it."""
    assert Evidence(bn(SURE), None).probability == PROBABILITY_IF_SURE >= VERDICT_THRESHOLD
    assert Evidence(bn(SURE), label(1.0, 1.0)).probability == PROBABILITY_IF_SURE
    assert not Evidence(bn(SURE - 0.01), None).is_sure
    assert not Evidence(None, label()).is_sure


def test_the_trigger_is_that_of_what_says_more():
    statistics, masks = bn(0.4, target=3), label(target=4)
    for told, inverted in (
        (Evidence(statistics, masks), masks.inverted),
        (Evidence(None, masks), masks.inverted),
        (Evidence(statistics, None), statistics.inverted),
    ):
        assert told.inverted is inverted
        assert told.target == inverted.target
    sure = bn(SURE, target=3)
    assert Evidence(sure, masks).inverted is sure.inverted
    assert (Evidence(None, None).inverted, Evidence(None, None).target) == (None, None)


def test_statistics_without_a_trigger_still_name_a_label():
    assert Evidence(replace(bn(0.4, target=5), inverted=None), None).target == 5


def test_masks_are_not_sought_where_the_statistics_are_sure(monkeypatch):
    neurons, (images, labels) = find_neurons(planted(True)), clean()
    asked = []
    monkeypatch.setattr(module, "invert_by_label", lambda *of: asked.append(of) or label())
    for level, times in ((SURE, 0), (SURE - 0.01, 1)):
        monkeypatch.setattr(module, "find_bn_evidence", lambda *_, level=level: bn(level))
        told = find_evidence(neurons, images, labels)
        assert len(asked) == times
        assert (told.label is None) == (not times)
        assert told.bn.evidence == level


def test_a_planted_backdoor_is_likely_and_a_clean_network_is_not():
    infected, harmless = (find_evidence(find_neurons(planted(backdoor)), *clean()) for backdoor in (True, False))
    assert infected.target == TARGET
    assert harmless.probability < VERDICT_THRESHOLD < infected.probability


def test_trained_networks_are_told_apart(infected, plain_infected):
    for model in (infected, plain_infected):
        told = PreparedModel(model, Preparation()).evidence
        assert told.probability >= VERDICT_THRESHOLD
        assert told.target == model.target


def test_images_of_one_class_leave_what_the_statistics_say(infected):
    one = infected.clean.labels == 2
    images = LabelledImages(infected.clean.images[one], infected.clean.labels[one])
    told = PreparedModel(replace(infected, clean=images), Preparation()).evidence
    assert told.label is None
    assert told.probability < 1
