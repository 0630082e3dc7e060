"""Arguments of wrong types, as people plausibly pass them, end in a typed error before the work begins."""

from pathlib import Path

import pytest
import torch
from torch import nn

from backdoor_gym import BackdoorGymError, InfectedModel, benchmark, infect, list_infected, load_infected, repair
from backdoor_gym.attacks.targets import check_target
from backdoor_gym.errors import DataError, UnknownNameError
from backdoor_gym.models.training import Schedule

NAMES = (None, 5, ["digits-badnets"], {}, "A" * 5000, "a\0b", "~nobody-of-that-name/x", "\x1b[31mx", b"x", object())


def refused(call, *arguments, **named):
    with pytest.raises(BackdoorGymError) as told:
        call(*arguments, **named)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 800


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_of_any_type(name, infected):
    refused(load_infected, name)
    refused(repair, name)
    refused(repair, infected, name)
    refused(infect, "digits", "small_cnn", name)
    refused(infect, "digits", name)
    if not isinstance(name, str):
        refused(infect, name, "small_cnn")


def test_patterns_are_texts():
    assert list_infected("A" * 5000) == []
    refused(list_infected, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy_budget", "x"), ("max_steps", -1), ("residual", []), ("device", 5), ("watch", 5), ("seed", "x"),
        ("look_ahead", 3), ("finetune", "a"), ("nothing_like_it", 1), ("policy", object()), ("policy", None),
        ("policy", Path("none.safetensors")), ("infected", None), ("infected", nn.Identity()),
    ],
)  # fmt: skip
def test_repair(infected, name, value):
    refused(repair, **{"infected": infected, "policy": "onp", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policies", "clp"), ("policies", 5), ("policies", [5]), ("policies", {"a": 5}), ("budgets", 0.1), ("budgets", "x"),
        ("budgets", ["x"]), ("budgets", [2]), ("seeds", "x"), ("seeds", None), ("jobs", -1), ("most", "a"), ("out", 5), ("ray", 5),
        ("max_steps", None), ("residual", None), ("device", []), ("clean_samples", 1.5), ("infected", 5), ("infected", [None]),
    ],
)  # fmt: skip
def test_benchmark(infected, tmp_path, name, value):
    refused(benchmark, **{"infected": infected, "policies": ["clp"], "out": tmp_path, "jobs": 1, name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", []), ("target", "some"), ("poison_rate", "x"), ("poison_rate", float("nan")), ("seed", "x"), ("seed", -1),
        ("schedule", {}), ("architecture_options", []), ("architecture_options", {5: 1}), ("architecture_options", {"width": "a"}),
        ("attack_options", 5), ("attack_options", {"size": "a"}), ("clean_images", "a"), ("device", "gpu"), ("checkpoint", 5),
        ("name", 5), ("penalty", 5),
    ],
)  # fmt: skip
def test_infect(name, value):
    refused(infect, "digits", "small_cnn", **{name: value})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", ["x", None, float("nan"), -1])
def test_schedules(name, value):
    refused(Schedule, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", 5), ("architecture", ["resnet18"]), ("options", 5), ("options", {5: 5}), ("module", 5), ("clean", 5),
        ("test", 5), ("clean_images", "x"), ("image_size", "x"), ("image_size", (0, 8)), ("preprocess", 5), ("timm", 5),
        ("data", 5),
    ],
)  # fmt: skip
def test_weights(infected, tmp_path, name, value):
    torch.save(infected.network.state_dict(), tmp_path / "a.pt")
    given = {
        "architecture": "small_cnn",
        "options": {"width": 16, "blocks": 2, "shape": "residual"},
        "clean": (infected.clean.images, infected.clean.labels),
    }
    load_infected(tmp_path / "a.pt", **given)
    refused(load_infected, tmp_path / "a.pt", **{**given, name: value})


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_single_logit_is_no_classifier_of_two(squeezed):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), *([nn.Flatten(0)] if squeezed else []))
    clean = (torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    with pytest.raises(DataError, match=r"a single logit.*torch\.cat\(\[-logit, logit\], 1\) / 2"):
        InfectedModel.from_module(network, clean)
    answer = network(clean[0]).flatten()
    both = torch.cat([-answer[:, None], answer[:, None]], 1) / 2
    assert torch.allclose(both.softmax(1)[:, 1], torch.sigmoid(answer))


@pytest.mark.parametrize("target", [[], {}, None, True, 1.0, "1", 10, "x" * 10**6, torch.tensor([1, 2])])
def test_targets(target):
    with pytest.raises(DataError, match="the target"):
        check_target(target, 10)


def test_unknown_names_say_what_they_are():
    with pytest.raises(UnknownNameError, match=r"unknown attack \['badnets'\] \(a name is a text"):
        infect("digits", "small_cnn", ["badnets"])
