"""Rounds of pruning, each under the trigger that is inverted anew in the pruned network."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from backdoor_gym import InfectedModel, repair, rounds
from backdoor_gym.analysis.evidence import Evidence
from backdoor_gym.analysis.label_inversion import ORDINARY, LabelEvidence
from backdoor_gym.policies.contract import JudgingPolicy
from backdoor_gym.rounds import ROUNDS, run_repair
from backdoor_gym.session import prepared_model

from .analysis.test_evidence import bn
from .analysis.test_label_inversion import CARRIER, TARGET, clean, planted

#: Where another trigger of the same label is.
OTHER_CORNER = [0, 1, 8, 9]


class Plan:
    """Prunes these units in each round, one round after the other, then stops."""

    def __init__(self, *units):
        self.units = iter(units)
        self.now = iter(())
        self.begun = 0

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        if episode_start is not None and episode_start[0]:
            self.begun += 1
            self.now = iter(next(self.units, ()))
        return next(self.now, len(observation["action_mask"]) - 1), None


class Judge(Plan):
    """The same, of a policy that judges networks itself."""

    def __init__(self, *units):
        super().__init__(*units)
        self.verdict_threshold = 0.75
        self.seen = []

    def predict(self, *arguments, **options):
        self.seen.append(self.verdict_threshold)
        return super().predict(*arguments, **options)


@pytest.fixture
def backdoored() -> InfectedModel:
    return InfectedModel.from_module(planted(True), clean())


def begun(model):
    env = gym.make("backdoor_gym:BackdoorPrune-v0", infected=model, accuracy_budget=None, disable_env_checker=True)
    return env, env.reset(seed=0)[0]


@pytest.fixture
def sought(monkeypatch):
    """The searches of the rounds, as their seed, success in the network that they were in, and smallest size."""
    searches, invert = [], rounds.invert_label

    def watched(neurons, images, labels, target, network, seed):
        trigger, sizes = invert(neurons, images, labels, target, network, seed)
        with torch.no_grad():
            given = (network(trigger.images).argmax(1) == target).float().mean().item()
        searches.append((seed, given, sizes.min().item()))
        return trigger, sizes

    monkeypatch.setattr(rounds, "invert_label", watched)
    return searches


@pytest.fixture
def small(monkeypatch):
    """In the first so many searches of the rounds the mask is still small; the seeds of all."""
    left, seeds, invert = [0], [], rounds.invert_label

    def faked(neurons, images, labels, target, network, seed):
        seeds.append(seed)
        if len(seeds) > left[0]:
            return invert(neurons, images, labels, target, network, seed)
        trigger, sizes = invert(neurons, images, labels, target, None, seed)  # as if nothing had been pruned
        return replace(trigger, size=float(seed)), sizes

    def first(count):
        left[0] = count
        return seeds

    monkeypatch.setattr(rounds, "invert_label", faked)
    return first


def test_where_the_mask_is_like_any_other_one_round_is_enough(backdoored, sought):
    policy = Plan([CARRIER], [0])
    env, observation = begun(backdoored)
    outcome, probability = run_repair(policy, env, observation, verdict=True)
    session = env.unwrapped.session
    assert outcome == "repaired"
    assert probability == session.prepared.evidence.probability
    assert policy.begun == 1
    assert np.flatnonzero(session.state.pruned).tolist() == [CARRIER]
    ((seed, _, size),) = sought
    assert seed == 1
    assert size >= ORDINARY * session.prepared.evidence.label.median
    assert session.prepared.inverted is session.prepared.evidence.inverted


def test_a_second_round_begins_where_the_mask_still_is_small(backdoored, small):
    seeds = small(1)
    policy = Plan([CARRIER], [0], [4])
    env, observation = begun(backdoored)
    outcome, _ = run_repair(policy, env, observation, verdict=True)
    session = env.unwrapped.session
    assert (outcome, policy.begun, seeds) == ("repaired", 2, [1, 2])
    assert session.state.changes == ((CARRIER, False), (0, False))
    assert session.prepared.inverted.size == 1.0  # the second round was under the trigger of the first search
    assert session.prepared.evidence.inverted.size != 1.0


def test_the_second_round_sees_the_new_trigger(backdoored, small):
    small(1)
    danger = []

    class Watching(Plan):
        def predict(self, observation, **options):
            action = super().predict(observation, **options)
            danger.append((self.begun, env.unwrapped.session.prepared.inverted.size))
            assert env.unwrapped.gave(observation)
            return action

    env, observation = begun(backdoored)
    run_repair(Watching([CARRIER], [0]), env, observation, verdict=True)
    own = env.unwrapped.session.prepared.evidence.inverted.size
    assert danger == [(1, own), (1, own), (2, 1.0), (2, 1.0)]


def test_there_are_not_more_rounds_than_so_many(backdoored, small):
    seeds = small(100)
    policy = Plan([CARRIER], *([unit] for unit in range(10)))
    env, observation = begun(backdoored)
    outcome, _ = run_repair(policy, env, observation, verdict=True)
    assert (outcome, policy.begun) == ("unrepairable", ROUNDS)
    assert seeds == list(range(1, ROUNDS + 1))
    session = env.unwrapped.session
    assert not session.state.pruned.any()
    taken = [CARRIER, *range(ROUNDS - 1)]
    assert [unit for unit, restored in session.state.changes if not restored] == taken
    assert sorted(unit for unit, restored in session.state.changes if restored) == sorted(taken)


def test_what_was_pruned_in_all_rounds_stays_where_nothing_is_taken_back(backdoored, small):
    small(100)
    env, observation = begun(backdoored)
    outcome, _ = run_repair(Plan([CARRIER], [0], [4]), env, observation, verdict=True, take_back=False)
    assert outcome == "unrepairable"
    assert np.flatnonzero(env.unwrapped.session.state.pruned).tolist() == [0, 4, CARRIER]


@pytest.mark.parametrize("units", [[], [0, 4]])
def test_where_the_danger_does_not_fall_there_is_no_second_round(backdoored, sought, units):
    policy = Plan(units, [CARRIER])
    env, observation = begun(backdoored)
    outcome, _ = run_repair(policy, env, observation, verdict=True)
    assert (outcome, policy.begun, sought) == ("unrepairable", 1, [])
    assert not env.unwrapped.session.state.pruned.any()


def test_a_network_without_signs_is_not_pruned(sought):
    policy = Plan([CARRIER])
    env, observation = begun(InfectedModel.from_module(planted(False), clean()))
    outcome, probability = run_repair(policy, env, observation, verdict=True)
    assert (outcome, policy.begun, sought) == ("untouched", 0, [])
    assert probability == env.unwrapped.session.prepared.evidence.probability


@pytest.mark.parametrize(("units", "outcome"), [([CARRIER], "repaired"), ([], "untouched")])
def test_without_a_verdict_there_is_one_round(backdoored, sought, units, outcome):
    policy = Plan(units, [0])
    env, observation = begun(backdoored)
    assert run_repair(policy, env, observation) == (outcome, None)
    assert (policy.begun, sought) == (1, [])
    assert np.flatnonzero(env.unwrapped.session.state.pruned).tolist() == units


@pytest.mark.parametrize("ordinary", [None, LabelEvidence(torch.arange(TARGET, TARGET + 2), torch.tensor([0.9, 1.0]))])
def test_masks_that_told_nothing_are_not_asked_again(backdoored, monkeypatch, sought, ordinary):
    """The statistics alone name a label, whose mask is an ordinary one."""
    find = prepared_model.find_evidence

    def found_by_statistics(neurons, images, labels):
        told = find(neurons, images, labels)
        return Evidence(replace(bn(0.99, target=TARGET), images=images), ordinary, told.inverted)

    monkeypatch.setattr(prepared_model, "find_evidence", found_by_statistics)
    policy = Plan([CARRIER], [0])
    env, observation = begun(backdoored)
    outcome, _ = run_repair(policy, env, observation, verdict=True)
    assert (outcome, policy.begun, sought) == ("repaired", 1, [])


def test_a_policy_that_judges_does_not_meanwhile_and_has_its_threshold_again(backdoored, small):
    small(1)
    policy = Judge([CARRIER], [0])
    assert isinstance(policy, JudgingPolicy)
    env, observation = begun(backdoored)
    assert run_repair(policy, env, observation)[0] == "repaired"
    assert policy.seen == [0.0] * 4
    assert policy.verdict_threshold == 0.75


def test_its_own_threshold_decides(backdoored):
    policy = Judge([CARRIER])
    policy.verdict_threshold = 1.0
    env, observation = begun(backdoored)
    assert run_repair(policy, env, observation)[0] == "untouched"
    assert (policy.begun, policy.verdict_threshold) == (0, 1.0)


def test_the_threshold_comes_back_where_the_policy_fails(backdoored):
    class Failing(Judge):
        def predict(self, *_, **__):
            raise RuntimeError("no")

    policy = Failing()
    with pytest.raises(RuntimeError):
        repair(backdoored, policy)
    assert policy.verdict_threshold == 0.75


def twice() -> torch.nn.Sequential:
    """Two triggers in two corners call the label, each by a unit of its own, the first one more easily."""
    simple = planted(True)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10)
    ).eval()
    with torch.no_grad():
        network[1].bias.zero_()
        network[1].weight[:11] = simple[1].weight
        network[1].weight[11] = 0
        network[1].weight[:, OTHER_CORNER] = 0
        network[1].weight[11, OTHER_CORNER] = 10.0
        network[3].bias.zero_()
        network[3].weight[:, :11] = simple[3].weight
        network[3].weight[:, 11] = simple[3].weight[:, CARRIER]
    return network


def test_a_trigger_that_was_hidden_by_another_is_found_in_the_second_round(sought):
    images, labels = clean()
    images.flatten(1)[:, OTHER_CORNER] = 0
    model = InfectedModel.from_module(twice(), (images, labels))
    result = repair(model, Plan([CARRIER], [11]), None, verdict=True)
    assert result.outcome == "repaired"
    assert result.pruned == ["1[10]", "1[11]"]
    (_, given, size), (_, _, last) = sought
    assert given > 0.75
    assert size < ORDINARY * result.evidence.label.median <= last
    half = repair(model, Plan([CARRIER]), None, verdict=True)
    assert (half.outcome, half.pruned) == ("unrepairable", [])
