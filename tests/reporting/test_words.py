from dataclasses import replace

import numpy as np
import pytest

from backdoor_gym.analysis.evidence import Evidence
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.metrics import Metrics
from backdoor_gym.reporting.conclusion import conclude
from backdoor_gym.reporting.reasons import MEANINGS, UNREMARKABLE, reasons

UNTOUCHED = {"outcome": "untouched", "verdict": 0.1}


def features(**scores):
    return np.array([scores.get(name, 0.0) for name in STATIC_FEATURES])


def test_every_feature_has_a_meaning():
    assert set(MEANINGS) | {"depth"} == set(STATIC_FEATURES)


def test_the_farthest_suspicious_features_are_named_first():
    found = reasons(features(uclc=2.0, pull=4.0, weight=5.0, kl=1.2, depth=1.0))
    assert [(chip.label, chip.score, chip.suspicious) for chip in found.chips] == [
        ("BN weight", 5.0, False),
        ("pull", 4.0, True),
        ("UCLC", 2.0, True),
        ("KL", 1.2, True),
    ]
    assert (
        found.words
        == "Pushes towards the suspected label under the trigger that was found; weights that amplify unusually."
    )


def test_what_speaks_against_a_backdoor_is_no_reason():
    found = reasons(features(uclc=-3.0, log_variance_ratio=2.0, saliency=3.0))
    assert found.words == UNREMARKABLE
    assert not any(chip.suspicious for chip in found.chips)
    assert reasons(features(log_variance_ratio=-2.0, saliency=-2.0)).words.startswith("Quieter on clean images")


@pytest.mark.parametrize(
    ("changes", "tone", "said"),
    [
        ({}, "good", "Signs of a backdoor that calls label 3: 2 of 112 neurons pruned"),
        ({"evidence": Evidence(None, None)}, "good", "Signs of a backdoor: 2 of 112"),
        ({"verdict": None}, "good", "2 of 112 neurons pruned by onp"),
        ({"after": Metrics(0.9, 0.7, 0.2)}, "bad", "The backdoor is still open. Signs"),
        ({"after": Metrics(0.9, 0.2, 0.7)}, "warning", "The backdoor is not quite closed. Signs"),
        ({"after": Metrics(0.8, 0.0, 0.7)}, "warning", "2 of 112 neurons pruned, at a price in accuracy"),
        (
            {"after": Metrics(0.8, 0.2, 0.7)},
            "warning",
            "not quite closed. Signs of a backdoor that calls label 3: 2 of 112",
        ),
        ({"after": Metrics(0.8, 0.7, 0.1)}, "bad", "neurons pruned, at a price in accuracy"),
        (
            {"pruned": [], "outcome": "unrepairable"},
            "warning",
            "Signs of a backdoor that calls label 3, which pruning does not remove",
        ),
        (
            {"outcome": "unrepairable"},
            "warning",
            "Signs of a backdoor that calls label 3, which pruning does not remove",
        ),
        ({"pruned": [], **UNTOUCHED}, "good", "No sign of a backdoor: the network is as it came"),
        ({"pruned": [], **UNTOUCHED, "after": Metrics(0.9, 1.0, 0.0)}, "bad", "The backdoor is still open. No sign"),
        ({"pruned": [], "outcome": "untouched", "verdict": None}, "good", "Nothing was pruned"),
    ],
)
def test_the_conclusion_is_what_happened(repaired, changes, tone, said):
    known = {
        "pruned": repaired.pruned[:2],
        "verdict": 0.9,
        "before": Metrics(0.92, 1.0, 0.0),
        "after": Metrics(0.91, 0.02, 0.9),
    }
    if changes.get("pruned") == [] and "after" not in changes:
        known |= {"before": Metrics(0.92), "after": Metrics(0.92)}
    found = conclude(replace(repaired, **{**known, **changes}))
    assert (found.tone, said in found.headline) == (tone, True), found
    measured = "The known trigger" in " ".join(found.sentences)
    assert measured == ({**known, **changes}["before"].asr is not None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The probability of a backdoor was 90.0% before the first prune."),
        ({"verdict": None}, "No verdict was asked for: a rule prunes any network, infected or not."),
        ({"outcome": "unrepairable"}, "2 neurons were pruned, and the signs stay."),
        ({"outcome": "unrepairable"}, "A larger accuracy budget may help."),
        (
            {"outcome": "unrepairable", "pruned": []},
            "Pruning did not remove the signs within the accuracy budget. The network is as it came.",
        ),
    ],
)
def test_the_sentences_say_what_the_outcome_rests_on(repaired, changes, said):
    result = replace(repaired, **{"pruned": repaired.pruned[:2], "verdict": 0.9, **changes})
    sentences = " ".join(conclude(result).sentences)
    assert said in sentences
    assert ("probability of a backdoor" in sentences) == (result.verdict is not None)
