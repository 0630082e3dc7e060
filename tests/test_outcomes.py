"""The three outcomes of a repair: left alone, repaired, or given back as it came."""

import json

import pytest
import torch

from backdoor_gym import InfectedModel, repair
from backdoor_gym.agents import ONP
from backdoor_gym.analysis.evidence import VERDICT_THRESHOLD
from backdoor_gym.errors import DataError
from backdoor_gym.policies.contract import JudgingPolicy
from backdoor_gym.rounds import FALLEN

from .analysis.test_label_inversion import CARRIER, TARGET, clean, planted

#: Name of the unit that carries the planted backdoor.
NAME = "1[10]"


class Prunes:
    """Prunes these units one after the other, then stops."""

    def __init__(self, *units):
        self.units = units

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        step = state or 0
        return self.units[step] if step < len(self.units) else len(observation["action_mask"]) - 1, step + 1


class MustNotBeAsked:
    def predict(self, *_, **__):
        pytest.fail("the policy was asked")


@pytest.fixture
def backdoored() -> InfectedModel:
    return InfectedModel.from_module(planted(True), clean())


@pytest.fixture
def harmless() -> InfectedModel:
    return InfectedModel.from_module(planted(False), clean())


def same_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_network_without_signs_of_a_backdoor_stays_as_it_is_bit_by_bit(harmless):
    result = repair(harmless, MustNotBeAsked(), verdict=True)
    assert result.outcome == "untouched"
    assert result.verdict == result.evidence.probability < VERDICT_THRESHOLD
    assert (result.pruned, result.course) == ([], ())
    assert result.mask.all()
    assert same_weights(result.network, harmless.network)


def test_where_the_signs_fall_the_network_is_repaired(backdoored):
    result = repair(backdoored, Prunes(CARRIER), verdict=True)
    assert result.outcome == "repaired"
    assert result.verdict >= VERDICT_THRESHOLD
    assert result.suspected_target == TARGET
    assert result.pruned == [NAME]
    assert result.snapshot.danger[-1] <= FALLEN * result.snapshot.danger[0]


def test_where_the_signs_stay_all_that_was_pruned_is_taken_back(backdoored):
    result = repair(backdoored, Prunes(0, 4), None, verdict=True)
    assert result.outcome == "unrepairable"
    assert result.pruned == []
    assert result.mask.all()
    assert same_weights(result.network, backdoored.network)
    assert [(change.neurons, change.given_back) for change in result.course] == [
        (("1[0]",), False), (("1[4]",), False), (("1[4]",), True), (("1[0]",), True),
    ]  # fmt: skip
    assert result.snapshot.danger[-1] == pytest.approx(result.snapshot.danger[0])
    assert result.clean_acc_after == result.clean_acc_before


def test_what_did_not_help_stays_pruned_where_that_is_asked_for(backdoored):
    result = repair(backdoored, Prunes(0, 4), None, verdict=True, take_back=False)
    assert result.outcome == "unrepairable"
    assert result.pruned == ["1[0]", "1[4]"]
    assert not any(change.given_back for change in result.course)
    assert not same_weights(result.network, backdoored.network)


def test_signs_that_nothing_was_done_about_stay(backdoored):
    result = repair(backdoored, Prunes(), verdict=True)
    assert (result.outcome, result.pruned, result.course) == ("unrepairable", [], ())


def test_a_published_rule_has_a_verdict_where_that_is_asked_for(backdoored, harmless):
    pruned = repair(harmless, "clp", u=0.1)
    assert (pruned.outcome, pruned.verdict) == ("repaired", None)
    assert pruned.pruned
    judged = repair(harmless, "clp", u=0.1, verdict=True)
    assert (judged.outcome, judged.pruned, judged.settings) == ("untouched", [], {"u": 0.1})
    found = repair(backdoored, "clp", u=2.0, verdict=True)
    assert (found.outcome, found.pruned) == ("repaired", [NAME])
    missed = repair(backdoored, "clp", u=100.0, verdict=True)
    assert (missed.outcome, missed.pruned) == ("unrepairable", [])
    assert repair(backdoored, "clp", u=100.0).outcome == "untouched"


@pytest.mark.parametrize("policy", ["onp", "ridge"])
def test_without_a_verdict_a_clean_network_is_pruned_as_any_other(harmless, policy):
    options = {"look_ahead": False, "max_steps": 2}
    left = repair(harmless, policy, None, **options)
    assert (left.outcome, left.pruned) == ("untouched", [])
    assert left.verdict < VERDICT_THRESHOLD
    pruned = repair(harmless, policy, None, verdict=False, **options)
    assert (pruned.outcome, pruned.verdict) == ("repaired", None)
    assert pruned.pruned


def test_a_policy_keeps_its_own_threshold(backdoored, harmless):
    onp = ONP(seed=0, verdict_threshold=0.99999)
    assert isinstance(onp, JudgingPolicy)
    onp.network.stop[-1].bias.data.fill_(-100)
    assert repair(harmless, onp, None, max_steps=1).outcome == "untouched"
    assert repair(harmless, onp, None, max_steps=1, verdict=False).pruned
    assert repair(backdoored, onp, None, max_steps=1).course
    assert onp.verdict_threshold == 0.99999


@pytest.mark.parametrize("wrong", [{"verdict": "yes"}, {"verdict": 1}, {"take_back": None}, {"take_back": 0}])
def test_verdict_and_take_back_are_true_or_false(harmless, wrong):
    with pytest.raises(DataError, match=f"{next(iter(wrong))} must be"):
        repair(harmless, "clp", **wrong)


def test_the_report_tells_outcome_and_signs(backdoored, tmp_path):
    result = repair(backdoored, Prunes(0), None, verdict=True)
    result.save(tmp_path)
    told = json.loads((tmp_path / "pruned.json").read_text())
    assert told["outcome"] == "unrepairable"
    assert told["verdict"] == result.verdict
    assert told["signs"] == dict(result.evidence.signs)
    assert told["suspected_target"] == TARGET
    assert (told["arguments"]["verdict"], told["arguments"]["take_back"]) == (True, True)
    assert "smallest part of an image" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_networks_of_the_package_end_each_in_its_way():
    """One of them cannot be repaired within a point by 200 images: half of these know what is lost to half a point."""
    for name, budget, outcome in (
        ("digits-clean", 0.01, "untouched"),
        ("digits-badnets", 0.01, "repaired"),
        ("digits-blended", 0.01, "unrepairable"),
        ("digits-blended", 0.02, "repaired"),
    ):
        result = repair(name, accuracy_budget=budget)
        assert result.outcome == outcome
        assert bool(result.pruned) == (outcome == "repaired")
        if outcome == "repaired":
            assert result.after.asr < 0.1
            assert result.lost.at_most <= budget + 1e-6
        else:
            assert same_weights(result.network, result.infected.network)
