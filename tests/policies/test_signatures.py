"""Every policy is called alike: its environment first, then what the registry says it has."""

from importlib import import_module
from inspect import signature

import pytest

from backdoor_gym.baselines import ANP, CLP, RNP, Rule
from backdoor_gym.errors import DataError
from backdoor_gym.policies.registry import POLICIES


def maker(name):
    module, _, attribute = POLICIES[name].home.partition(":")
    return getattr(import_module(module), attribute)


RULES = [name for name in POLICIES if isinstance(maker(name), type) and issubclass(maker(name), Rule)]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_its_environment_its_threshold_and_a_budget(name):
    assert list(signature(maker(name)).parameters)[:3] == ["env", POLICIES[name].threshold, "accuracy_budget"]
    assert maker(name).prune.__func__ is Rule.prune.__func__


@pytest.mark.parametrize("name", [name for name in POLICIES if "env" in signature(maker(name)).parameters])
def test_what_is_no_environment_is_refused(name):
    for value in (1.5, "auto", [None]):
        with pytest.raises(DataError, match="environment"):
            maker(name)(value)


@pytest.mark.parametrize("rule", [ANP, RNP])
def test_learned_masks_take_a_seed(rule):
    assert rule(None, seed=3).seed == 3
    with pytest.raises(DataError, match="seed"):
        rule(None, seed=-1)


def test_the_threshold_of_clp_is_no_environment():
    with pytest.raises(DataError, match="CLP is for a Gymnasium or Stable-Baselines3 environment"):
        CLP(3.0)
