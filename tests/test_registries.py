"""Policies, attacks and architectures are what their one line in a registry says, wherever a user meets their names."""

import inspect
import json
import re
from pathlib import Path

import pytest

from backdoor_gym import baselines
from backdoor_gym.agents import ScoringPolicy
from backdoor_gym.attacks import ATTACKS, Attack
from backdoor_gym.cli import app
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import UnknownNameError
from backdoor_gym.networks import ARCHITECTURES
from backdoor_gym.policies.contract import Policy
from backdoor_gym.policies.registry import POLICIES, make_policy, options_of
from backdoor_gym.repairing import repair

DOCS = Path(__file__).parents[1] / "docs"
#: Options of each policy by name: what ``repair`` passes on.
OPTIONS = {
    "onp": {"finetune", "look_ahead", "seed"},
    "ridge": {"look_ahead"},
    "clp": {"u"},
    "bnp": {"threshold"},
    "ep": {"threshold"},
    "anp": {"threshold", "seed", "steps", "alpha", "eps"},
    "rnp": {"threshold", "seed"},
    "fine-pruning": {"threshold"},
    "magnitude": {"threshold"},
    "greedy": {"candidates"},
    "random": {"seed"},
}


@pytest.fixture(scope="module")
def env(infected):
    return BackdoorPruneEnv(infected, score_samples=0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_made_by_its_name(name, env):
    policy = make_policy(name, env, {})
    assert isinstance(policy, Policy)
    assert set(options_of(name)) == OPTIONS[name]
    threshold, published = POLICIES[name].threshold, getattr(policy, "published", None)
    assert (threshold in OPTIONS[name]) == (threshold is not None)
    if isinstance(policy, baselines.Rule):
        assert policy.symbol == threshold
        assert (POLICIES[name].budget is None) == (published is not None)  # published thresholds need no guard
    else:
        assert isinstance(policy, ScoringPolicy) == (name in ("onp", "ridge"))


def test_every_rule_of_the_package_has_a_name():
    classes = {
        public
        for public in vars(baselines).values()
        if inspect.isclass(public) and issubclass(public, Policy) and public not in (Policy, baselines.Rule)
    }
    registered = {registered.home.partition(":")[2] for registered in POLICIES.values()}
    assert {public.__name__ for public in classes} == registered - {"onp", "ridge"}


def test_names_of_policies_are_those_that_are_told():
    described = re.sub(r"\s+", " ", inspect.getdoc(repair))
    assert [name for name in POLICIES if f'"{name}"' not in described] == []
    with pytest.raises(UnknownNameError, match="unknown policy") as told:
        repair("digits-badnets", "qqqqqqqqqq")
    assert [name for name in POLICIES if name not in str(told.value)] == []


def test_attacks_are_known_by_their_own_names():
    assert all(attack.name == name and issubclass(attack, Attack) for name, attack in ATTACKS.items())
    modules = {attack.__module__ for attack in ATTACKS.values()}
    assert len(modules) == len(ATTACKS) == 8  # a file for each


def test_architectures_take_what_every_architecture_takes():
    for name, build in ARCHITECTURES.items():
        parameters = inspect.signature(build).parameters
        assert list(parameters)[:2] == ["num_classes", "in_channels"], name
        options = list(parameters.values())[2:]
        assert "width" in parameters, name
        assert all(option.default is not option.empty for option in options), name


def test_the_list_and_the_pages_name_them_all(capsys):
    app(["list", "--json"], standalone_mode=False)
    listed = json.loads(capsys.readouterr().out)
    assert listed["architectures"] == sorted(ARCHITECTURES)
    assert listed["attacks"] == [*sorted(ATTACKS), "clean"]
    pages = {page: (DOCS / f"{page}.md").read_text() for page in ("architectures", "attacks", "baselines", "agents")}
    assert [name for name in ARCHITECTURES if f"`{name}`" not in pages["architectures"]] == []
    assert [name for name in ATTACKS if f"`{name}`" not in pages["attacks"]] == []
    assert [name for name in POLICIES if name not in (pages["baselines"] + pages["agents"]).lower()] == []
