"""Both default policies go through without batch normalisation; other kinds, trained ones, are in benchmarks/architectures.py."""

import pytest
import torch

from backdoor_gym import InfectedModel, repair
from backdoor_gym.analysis.evidence import PRIOR
from backdoor_gym.analysis.label_inversion import compare_labels

from .tiny import tiny, tiny_images


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_repairs_go_through(name):
    network = tiny(name)
    model = InfectedModel.from_module(network, (tiny_images(20), torch.arange(20) % 10))
    for policy, options in (("clp", {"u": 0.5}), ("onp", {"look_ahead": False, "verdict": False})):
        result = repair(model, policy, accuracy_budget=None, max_steps=2, **options)
        assert (policy == "clp") <= len(result.pruned) <= 2
        if not result.pruned:
            continue
        layer = next(layer for layer in result.neurons.layers if result.pruned[0].startswith(f"{layer.name}["))
        channel = int(result.pruned[0].split("[")[-1][:-1])
        module = dict(result.network.named_modules()).get(layer.module)
        assert module is not None or layer.module.endswith(
            "in_proj"
        )  # heads of an attention are no module of their own
        assert module is None or not module.weight[channel].any()
        with torch.no_grad():
            assert not torch.equal(result.network(tiny_images()), network(tiny_images()))
    sought = compare_labels(result.neurons, model.clean.images, model.clean.labels)
    assert result.suspected_target == sought.target
    judged = repair(model, accuracy_budget=None, max_steps=2)
    assert (judged.verdict, judged.outcome) == (PRIOR, "untouched")  # a network that guesses tells nothing
