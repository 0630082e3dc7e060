"""Arguments of wrong types, as people plausibly pass them, end in a typed error before the work begins."""

from pathlib import Path

import pytest
import torch
from torch import nn

from backdoor_gym import (
    BackdoorGymError,
    InfectedModel,
    benchmark,
    detect,
    infect,
    list_infected,
    load_infected,
    repair,
)
from backdoor_gym.attacks.targets import check_target
from backdoor_gym.baselines import clp
from backdoor_gym.data.own_images import own_images
from backdoor_gym.errors import DataError, UnknownNameError, UntraceableError, WriteError
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
    refused(detect, name)
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
        ("fill", "avg"), ("fill", None), ("look_ahead", 3), ("finetune", "a"), ("nothing_like_it", 1), ("policy", object()),
        ("policy", None), ("policy", Path("none.safetensors")), ("infected", None), ("infected", nn.Identity()),
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


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


class Breaking(torch.utils.data.Dataset):
    """Its fourth item raises what its author did not foresee."""

    def __len__(self):
        return 6

    def __getitem__(self, place):
        if place == 3:
            raise ValueError("no such picture")
        return torch.rand(1, 8, 8), place


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.rand(1, 8, 8), 0
        raise RuntimeError("no such picture")


PAIR = torch.rand(8, 1, 8, 8), torch.arange(8)


@pytest.mark.parametrize("preprocess", [None, torch.nn.Identity()])
@pytest.mark.parametrize("network", [Net, "network", 5, Net().state_dict()])
def test_what_is_no_network(network, preprocess):
    with pytest.raises(DataError, match=r"must be a torch\.nn\.Module, not"):
        InfectedModel.from_module(network, PAIR, preprocess=preprocess)


@pytest.mark.parametrize(
    ("clean", "words"),
    [
        ({"images": PAIR[0], "labels": PAIR[1]}, "a pair"),
        (PAIR[0], "a pair"),
        ((*PAIR, PAIR[1]), "a pair"),
        (Breaking(), "item 3 of the Breaking .*ValueError: no such picture"),
        (torch.utils.data.DataLoader(Breaking(), 2), "batch 1 of the DataLoader .*no such picture"),
        (Stream(), "item 1 of the Stream .*no such picture"),
    ],
)
def test_what_is_no_clean_images(clean, words):
    with pytest.raises(DataError, match=words):
        InfectedModel.from_module(Net(), clean)
    if isinstance(clean, torch.utils.data.DataLoader):
        with pytest.raises(DataError, match=r"item 3 of the Breaking .*no such picture"):
            own_images(clean, 5)


def test_a_network_that_answers_labels_is_told_so():
    class Labels(Net):
        def forward(self, images):
            return super().forward(images).argmax(1)

    with pytest.raises(DataError, match=r"labels .*argmax"):
        InfectedModel.from_module(Labels(), PAIR)


def test_a_network_alone_is_told_of_from_module(tmp_path):
    for call in (repair, load_infected, lambda network: benchmark(network, out=tmp_path)):
        with pytest.raises(DataError, match=r"InfectedModel\.from_module\(network, clean="):
            call(Net())


def test_a_network_without_neurons_is_called_by_its_own_name():
    model = InfectedModel.from_module(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), PAIR, preprocess=nn.Identity())
    with pytest.raises(UntraceableError, match=r"^Sequential has no prunable neuron"):
        repair(model, "magnitude")


def test_options_of_other_policies_are_told_whose_they_are(infected):
    with pytest.raises(UnknownNameError, match="u is an option of clp"):
        repair(infected, "onp", u=3)
    with pytest.raises(UnknownNameError, match="finetune is an option of onp"):
        repair(infected, "clp", finetune=3)


def test_clp_takes_logits_out_of_answers_as_everything_does():
    class Answer(Net):
        def forward(self, images):
            return {"out": super().forward(images), "features": images.flatten(1)}

    torch.manual_seed(0)
    plain = Net()
    wrapped = Answer()
    wrapped.load_state_dict(plain.state_dict())
    for options in ({}, {"clean": PAIR}):
        pruned, expected = (clp.prune(network, u=0.5, **options).state_dict() for network in (wrapped, plain))
        assert all(torch.equal(value, expected[key]) for key, value in pruned.items())


def test_a_repair_is_saved_in_a_folder(infected, tmp_path):
    result = repair(infected, "clp")
    refused(result.save, 3)
    refused(infected.save, 3)
    (tmp_path / "clean.npz").write_text("old")
    with pytest.raises(WriteError, match="a folder is needed"):
        result.save(tmp_path / "clean.npz")
    assert (tmp_path / "clean.npz").read_text() == "old"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attack_options": {"size": "abc"}}, "size of badnets must be a whole number, not 'abc'"),
        ({"attack_options": {"size": 2.5}}, "size of badnets must be a whole number, not 2.5"),
        ({"architecture_options": {"blocks": "abc"}}, "blocks of small_cnn must be a whole number, not 'abc'"),
        ({"architecture_options": {"shape": 3}}, "shape of small_cnn must be a text, not 3"),
    ],
)
def test_options_of_another_type_are_told_which(options, words):
    with pytest.raises(DataError, match=words):
        infect("digits", "small_cnn", **options)


@pytest.mark.parametrize("target", [[], {}, None, True, 1.0, "1", 10, "x" * 10**6, torch.tensor([1, 2])])
def test_targets(target):
    with pytest.raises(DataError, match="the target"):
        check_target(target, 10)


def test_unknown_names_say_what_they_are():
    with pytest.raises(UnknownNameError, match=r"unknown attack \['badnets'\] \(a name is a text"):
        infect("digits", "small_cnn", ["badnets"])
