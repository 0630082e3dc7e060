from dataclasses import replace

import numpy as np
import pytest

from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.metrics import Metrics
from backdoor_gym.reporting.conclusion import conclude
from backdoor_gym.reporting.reasons import MEANINGS, UNREMARKABLE, reasons


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
        ({"suspected_target": None}, "good", "Signs of a backdoor: 2 of 112"),
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
        ({"pruned": []}, "warning", "Signs of a backdoor that calls label 3, but nothing was pruned"),
        ({"pruned": [], "verdict": 0.1}, "good", "No sign of a backdoor: nothing was pruned"),
        ({"pruned": [], "verdict": 0.1, "after": Metrics(0.9, 1.0, 0.0)}, "bad", "The backdoor is still open. No sign"),
        ({"pruned": [], "verdict": None}, "good", "Nothing was pruned"),
    ],
)
def test_the_conclusion_is_what_happened(repaired, changes, tone, said):
    known = {
        "pruned": repaired.pruned[:2],
        "verdict": 0.9,
        "suspected_target": 3,
        "before": Metrics(0.92, 1.0, 0.0),
        "after": Metrics(0.91, 0.02, 0.9),
    }
    if changes.get("pruned") == [] and "after" not in changes:
        known |= {"before": Metrics(0.92), "after": Metrics(0.92)}
    found = conclude(replace(repaired, **{**known, **changes}))
    assert (found.tone, said in found.headline) == (tone, True), found
    measured = "The known trigger" in " ".join(found.sentences)
    assert measured == ({**known, **changes}["before"].asr is not None)
