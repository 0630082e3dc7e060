"""Repairs that the tests of the report share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym import InfectedModel, RepairResult, repair
from backdoor_gym.neurons.layers import NeuronLayer, Neurons
from backdoor_gym.reporting.result import Change

#: What a model file may say, to be shown and not to be obeyed.
HOSTILE = "\"'><script>alert(1)</script><img src='http://evil.example/x.png' onerror='alert(2)'>{{ 7*7 }}$\\frac{\u202e\x00\ud800"


@pytest.fixture(scope="session")
def repaired(infected) -> RepairResult:
    """By the default policy, trigger and test images known."""
    return repair(infected, accuracy_budget=0.05)


@pytest.fixture(scope="session")
def untouched() -> RepairResult:
    """Of a network without a backdoor."""
    return repair("digits-clean")


@pytest.fixture(scope="session")
def hostile(infected) -> RepairResult:
    """Of a model whose names and facts are an attack on the reader."""
    model = replace(infected, name=HOSTILE * 30, facts={HOSTILE: [HOSTILE], "long": "x" * 100_000})
    return repair(model, "clp", u=1.5)


@pytest.fixture(scope="session")
def hostile_layers() -> RepairResult:
    """The same of a module whose layers are so called."""
    torch.manual_seed(0)
    name = "<script>alert(1)</script>{{ 7*7 }}$_{" + "x" * 200
    layers = {name: nn.Conv2d(1, 20, 3), "relu": nn.ReLU(), "flat": nn.Flatten(), "out": nn.Linear(720, 3)}
    module = nn.Sequential()
    for key, layer in layers.items():
        module.add_module(key, layer)
    with torch.no_grad():
        module[0].weight[4] *= 50
    clean = (torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    return repair(InfectedModel.from_module(module, clean=clean, name=HOSTILE), "clp")


@pytest.fixture(scope="session")
def own() -> RepairResult:
    """Of somebody's module without batch normalisation, with colour images and nothing known."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 20, 3, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20 * 32 * 25, 5))
    with torch.no_grad():
        module[0].weight[4] *= 50
    images = torch.rand(12, 3, 130, 100)
    return repair(InfectedModel.from_module(module, clean=(images, torch.arange(12) % 5)), "clp")


@pytest.fixture(scope="session")
def large(repaired) -> RepairResult:
    """As of a network of 4,800 neurons, of which 400 are pruned (a drawing needs no network)."""
    sizes = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5
    layers, start = [], 0
    for index, size in enumerate(sizes):
        layers.append(NeuronLayer(f"layer{index}.0.conv1", "", True, "", size, start, (), index))
        start += size
    neurons = Neurons(layers, repaired.neurons.graph)
    random = np.random.default_rng(0)
    mask = np.arange(start) % 12 != 0
    pruned = [neurons.names[index] for index in np.flatnonzero(~mask)]
    features = random.normal(size=(start, repaired.features.shape[1])).astype(np.float32)
    nothing = np.zeros(start, dtype=bool)
    snapshot = replace(
        repaired.snapshot,
        layers=tuple((layer.name, layer.size) for layer in layers),
        suspicion=features.max(1),
        strengths=random.random(start),
        pruned=~mask,
        undone=nothing,
        latest=nothing,
    )
    course = tuple(Change((name,), False, 0.9, 0.5) for name in pruned)
    return replace(
        repaired, neurons=neurons, mask=mask, pruned=pruned, features=features, snapshot=snapshot, course=course
    )
