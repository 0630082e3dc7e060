"""How benchmarks/compatibility.py draws networks and what it says of them; the networks themselves need other packages."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.neurons.finding import find_neurons

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return [importlib.import_module(f"compatibility{part}") for part in ("", "_networks", "_checks")]


def row(name="net", **facts):
    return {
        "package": "timm",
        "family": name,
        "name": name,
        "version": "1",
        "quick": False,
        "stage": "done",
        "found": True,
        "neurons": 8,
        "coverage": 1.0,
        "masks": {"unmasked": 0.0, "written": 0.0, "hooked": 0.0, "allowed": 1e-4, "right": True},
        "batch_norms": {"calls": 2, "unseen": 0, "first": []},
        "clp": {"finite": True},
        "cut": {"error": 0.0, "equal": True, "pruned": 0.3, "smaller": 0.4, "enough": True, "stops": []},
        "onp": {"pruned": 2, "steps": 2},
    } | facts


def test_the_first_name_within_the_bounds_is_drawn(modules):
    _, networks, _ = modules
    sizes = {"a": (10**9, 10), "b": (10**6, 10**4), "c": (10**6, 100), "d": (10, 1)}
    assert networks.first_fitting(["d", "c", "b", "a"], sizes.get) == "c"


def test_where_none_is_within_the_bounds_the_smallest_is_drawn(modules):
    _, networks, _ = modules
    assert networks.first_fitting(["a", "b"], {"a": (9 * 10**8, 10), "b": (10**8, 10)}.get) == "b"


def test_one_that_is_not_built_is_drawn_all_the_same(modules):
    _, networks, _ = modules
    assert networks.first_fitting(["a", "b"], {"b": (10, 1)}.get) == "a"


def test_every_tenth_of_a_package_is_repaired_in_full(modules):
    compatibility, *_ = modules
    drawn = [{"package": "timm", "name": str(index)} for index in range(21)]
    assert compatibility.sampled(drawn) == {("timm", "0"), ("timm", "10"), ("timm", "20")}


def test_a_checked_network_is_left_alone_unless_asked_for(modules):
    compatibility, *_ = modules
    assert compatibility.is_open({"package": "timm", "name": "net"}, False, None)
    assert not compatibility.is_open(row(), False, None)
    assert compatibility.is_open(row(), False, "timm/n.t")
    assert compatibility.is_open(row(quick=True), False, None)
    assert not compatibility.is_open(row(quick=True), True, None)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"coverage": 0.5, "gaps": [["fc", 8, "gates"]]}, "coverage 0.50: fc (gates)"),
        ({"masks": {**row()["masks"], "hooked": 0.5, "right": False}}, "masks are wrong: hooked 5e-01"),
        ({"batch_norms": {"calls": 2, "unseen": 1, "first": ["bn"]}}, "1 of 2 batch normalisations not seen, first bn"),
        ({"cut": {**row()["cut"], "error": 0.5, "equal": False}}, "the cut network answers differently, by 5e-01"),
        ({"clp": {"untyped": "KeyError: 1"}}, "clp fails: KeyError: 1"),
        ({"onp": {"refused": "DataError: no"}}, "onp is refused: DataError: no"),
        ({"stage": "cut", "ended": "time limit of 1 s"}, "cut: time limit of 1 s"),
    ],
)
def test_what_is_missing_is_said_and_the_network_is_not_whole(modules, facts, said):
    compatibility, *_ = modules
    assert compatibility.is_whole(row())
    assert compatibility.faults(row(**facts)) == [said]
    assert not compatibility.is_whole(row(**facts))


def test_the_page_counts_and_names(modules):
    compatibility, *_ = modules
    rows = [
        row("good"),
        row("bad", coverage=0.2, gaps=[["fc", 8, "a | b"]]),
        row("other", not_built="no classifier"),
        {"package": "pytorchcv", "family": "open", "name": "open", "version": "1"},
    ]
    page = compatibility.page(rows, {"timm": "1"})
    assert "| drawn | 4 |" in page
    assert "| checked | 2 |" in page
    assert "| neurons found | 2 (100.0 %) |" in page
    assert "| whole | 1 (50.0 %) |" in page
    assert "| `bad` | 8 | 0.20 | 40 % | coverage 0.20: fc (a \\| b) |" in page
    assert "Without a fault (1): `good`." in page
    assert "`other` (no classifier)" in page
    assert json.loads(json.dumps(rows)) == rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, images):
        return self.fc(torch.relu(self.bn(self.conv(images))).mean((2, 3)))


def test_hooks_mask_the_authors_own_module(modules):
    *_, networks, checks = modules
    torch.manual_seed(0)
    network, images = Net().eval(), torch.rand(3, 3, 8, 8)
    networks.draw_weights(network)
    networks.calibrate(network, images)
    neurons, found = find_neurons(network, images), {}
    checks.check_masks(found, network, network, neurons, images)
    assert found["masks"]["right"]
    assert found["masks"]["hookable"] == 1
    assert found["masks"]["effect"] > 1e-3
    assert found["batch_norms"] == {"calls": 1, "unseen": 0, "first": []}
    kept = np.ones(8, dtype=bool)
    kept[:4] = False
    with checks.Hooks({id(network.bn.weight): torch.from_numpy(kept.astype(np.float32))}):
        hooked = checks.forward(network, images)
    with torch.no_grad():
        network.bn.weight[:4] = network.bn.bias[:4] = 0
    torch.testing.assert_close(hooked, checks.forward(network, images))
