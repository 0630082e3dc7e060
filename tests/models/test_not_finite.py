"""Numbers that overflow stop a search with one line: nothing that is not finite goes on."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym import InfectedModel, repair
from backdoor_gym.analysis.label_inversion import compare_labels, invert_label
from backdoor_gym.analysis.trigger_families import Warp
from backdoor_gym.analysis.trigger_inversion import invert_trigger
from backdoor_gym.baselines import ANP, RNP, Magnitude
from backdoor_gym.errors import WeightsError
from backdoor_gym.metrics import require_finite
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


def test_require_finite_names_what_overflowed():
    require_finite("a loss", torch.ones(2), torch.zeros(0))
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(WeightsError, match="a loss is not finite"):
            require_finite("a loss", torch.ones(2), torch.tensor([0.0, value]))


@pytest.mark.parametrize("search", ["means", "labels", "label"])
def test_a_search_for_the_trigger_stops(infected, monkeypatch, search):
    prepared = PreparedModel(infected, Preparation())
    images, labels = infected.clean.images, infected.clean.labels
    suspected = prepared.suspected
    monkeypatch.setattr(
        torch.autograd, "grad", lambda _, inputs, **__: [torch.full_like(one, torch.nan) for one in inputs]
    )
    reached = []
    monkeypatch.setattr(Warp, "__call__", lambda self, some: reached.append(self.parameter.detach().clone()) or some)
    search, more = {
        "means": (invert_trigger, [suspected]),
        "labels": (compare_labels, []),
        "label": (invert_label, [infected.target]),
    }[search]
    with pytest.raises(WeightsError, match="search for the trigger is not finite"):
        search(prepared.neurons, images, labels, *more)
    assert all(torch.isfinite(parameter).all() for parameter in reached)


@pytest.mark.parametrize("rule", [ANP, RNP])
def test_rules_that_learn_stop(infected, monkeypatch, rule):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, *_: logits.sum() * torch.nan)
    options = {"steps": 2} if rule is ANP else {}
    with pytest.raises(WeightsError, match="not finite"):
        rule.prune(infected.network, (infected.clean.images, infected.clean.labels), **options)


def test_scores_are_finite(infected, monkeypatch):
    monkeypatch.setattr(Magnitude, "scores", lambda self, defender: np.full(len(defender.neurons), np.nan))
    with pytest.raises(WeightsError, match="score of Magnitude"):
        Magnitude.prune(infected.network, (infected.clean.images, infected.clean.labels))


def test_extreme_weights_end_in_a_repair_or_in_one_line(infected):
    for factor in (1e20, 1e30, 1e37):
        network = copy.deepcopy(infected.network)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(factor)
                    break
        with suppress(WeightsError):
            model = InfectedModel.from_module(network, (infected.clean.images, infected.clean.labels))
            assert np.isfinite(repair(model, max_steps=2).features).all()
