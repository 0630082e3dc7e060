import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from backdoor_gym import load_infected, repair
from backdoor_gym.data import datasets
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.data.own_images import all_images, own_images
from backdoor_gym.errors import DataError, ModelFileError, UnknownNameError, WeightsError
from backdoor_gym.files.checkpoints import Checkpoint
from backdoor_gym.models.foreign import BACKDOORBENCH, find_architecture, make_module
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.networks import build
from backdoor_gym.networks.preprocessing import Normalise

CODE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes=10):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
        )

def small():
    return Net(5)

def broken():
    raise ValueError("no weights today")

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, and weights of its class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    (tmp_path / "own_net.py").write_text(CODE)
    network = make_module("own_net:Net")
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, "own.pth")
    yield network
    sys.modules.pop("own_net", None)


@pytest.fixture
def ours(infected, tmp_path):
    """Weights of an architecture of this package, saved by somebody else."""
    torch.save({"net": infected.network.state_dict(), "acc": np.float32(0.9)}, tmp_path / "ours.pt")
    return tmp_path / "ours.pt"


OPTIONS = {"width": 16, "blocks": 2, "shape": "residual"}


def test_wrappers_around_a_network_of_ones_own_are_taken_off(own, tmp_path):
    images = torch.rand(20, 1, 8, 8)
    for wrapped in (nn.DataParallel(own), torch.compile(own, backend="eager")):
        for weights in (own, wrapped):
            torch.save(weights.state_dict(), "w.pth")
            model = load_infected("w.pth", module=lambda: wrapped, clean=(images, torch.arange(20) % 10))  # noqa: B023
            assert type(model.network) is type(own)


@pytest.mark.parametrize("data", ["./nonexistent", "uoft-cs/cifar10"])
def test_data_is_used_or_refused_and_never_ignored(own, infected, data, tmp_path):
    pair = infected.clean.images, infected.clean.labels
    held = InfectedModel(infected.network, LabelledImages(*pair), architecture=infected.architecture).save(
        tmp_path / "held"
    )
    for name in ("digits-badnets", "digits-test/3", held):
        with pytest.raises((DataError, UnknownNameError)):
            load_infected(name, data)
    with pytest.raises(DataError, match="--clean"):
        load_infected("own.pth", data, module="own_net:Net", clean=pair)
    assert load_infected("digits-badnets", "digits").name == "digits-badnets"


def test_files_that_hold_no_weights_are_called_what_they_are(own):
    Path("empty.pth").touch()
    Path("few.pth").write_bytes(b"abc")
    torch.jit.script(own).save("script.pt")
    for name, words in (
        ("empty.pth", "is empty"),
        ("few.pth", "is no file of weights"),
        ("own_net.py", "is no file of weights"),
        ("nope.pth", "there is no file nope.pth"),
        ("script.pt", "is TorchScript"),
    ):
        with pytest.raises(ModelFileError, match=words):
            load_infected(name, module="own_net:Net", clean=(torch.rand(20, 1, 8, 8), torch.arange(20) % 10))


@pytest.mark.slow
def test_weights_of_a_known_architecture_with_a_named_data_set(ours, infected, tmp_path):
    model = load_infected(ours, architecture="Small-CNN", options=OPTIONS, clean="digits", clean_images=100)
    assert model.architecture == {"name": "small_cnn", "num_classes": 10, "in_channels": 1, **OPTIONS}
    images = infected.clean.images
    with torch.no_grad():
        assert torch.allclose(model.network(images), infected.network(images), atol=1e-4)
    assert (model.name, model.checkpoint) == ("ours", str(ours))
    assert (len(model.clean), len(model.test)) == (100, 1697)
    assert "numpy.dtype" in model.facts["unread"]
    result = repair(model, "clp", u=1.5)
    assert result.pruned == repair(infected, "clp", u=1.5).pruned
    weights = load_file(result.save(tmp_path / "repaired")[0])
    again = build(**model.architecture)
    again.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), result.network(images))
    once_more = load_infected(
        tmp_path / "repaired" / "repaired.safetensors", architecture="small_cnn", options=OPTIONS, clean="digits"
    )
    assert once_more.evaluate().acc == pytest.approx(result.after.acc, abs=0.02)


def test_a_known_architecture_can_be_saved_as_an_infected_model(ours, tmp_path):
    model = load_infected(
        ours, architecture="small_cnn", options=OPTIONS, clean="digits", preprocess=Normalise([0.5], [0.25])
    )
    again = load_infected(model.save(tmp_path / "kept.safetensors"))
    assert again.checkpoint is None
    with torch.no_grad():
        assert torch.equal(again.network(model.clean.images), model.network(model.clean.images))


def test_a_module_of_the_users(own, tmp_path):
    images = (np.random.default_rng(0).random((20, 8, 8)) * 255).astype(np.uint8)
    np.savez("clean.npz", images=images, labels=np.arange(20) % 10)
    model = load_infected("own.pth", module="own_net:Net", clean="clean.npz", test="digits")
    assert type(model.network).__name__ == "Net"
    assert (len(model.clean), len(model.test)) == (20, 1797)
    with torch.no_grad():
        assert torch.equal(model.network(model.clean.images), own.eval()(model.clean.images))
    result = repair(model, "clp", u=0.5)
    fresh = make_module("own_net:Net")
    fresh.load_state_dict(load_file(result.save(tmp_path / "out")[0]))
    assert result.pruned
    assert torch.equal(fresh[0].weight, result.network[0].weight)


@pytest.mark.parametrize("module", [nn.Flatten(), nn.Flatten, lambda: nn.Flatten()])
def test_modules_classes_and_functions(module):
    assert isinstance(make_module(module), nn.Flatten)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("own_net", "package.module:factory"),
        ("own_nett:Net", "cannot be imported: ModuleNotFoundError"),
        ("own_net:Nett", "cannot be imported: AttributeError"),
        ("own_net:broken", "cannot be called without arguments: ValueError: no weights today"),
        ("own_net:number", "must be or give a torch.nn.Module, not int"),
    ],
)
def test_code_that_gives_no_module_is_told(own, module, words):
    with pytest.raises(DataError, match=words):
        make_module(module)


def test_what_is_missing_or_does_not_fit_is_told(own, ours, infected_file, tmp_path):
    for arguments, error, words in (
        ({}, ModelFileError, "--arch NAME or --module"),
        ({"module": "own_net:Net"}, DataError, "--clean"),
        ({"module": "own_net:Net", "architecture": "small_cnn", "clean": "digits"}, DataError, "not to both"),
        ({"module": "own_net:small", "clean": "digits"}, WeightsError, r"5\.weight \(10, 8\) instead of \(5, 8\)"),
        ({"architecture": "resnet19", "clean": "digits"}, UnknownNameError, "did you mean 'resnet18'"),
        ({"architecture": "small_cnn", "clean": "digits"}, WeightsError, "missing"),
        (
            {"module": "own_net:Net", "clean": (torch.rand(4, 3, 8, 8), torch.zeros(4).long())},
            DataError,
            "cannot take images",
        ),
        (
            {"module": "own_net:Net", "clean": (torch.rand(4, 1, 8, 8), torch.full((4,), 12))},
            DataError,
            "labels must be",
        ),
    ):
        with pytest.raises(error, match=words):
            load_infected("own.pth", **arguments)
    with pytest.raises(DataError, match="complete as it is; clean is for"):
        load_infected(infected_file, clean="digits")
    with pytest.raises(DataError, match="complete as it is; module is for"):
        load_infected("digits-badnets", module="own_net:Net")
    save_file(own.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ModelFileError, match="--arch NAME or --module"):
        load_infected(tmp_path / "plain.safetensors")


def test_class_folders_must_be_as_many_as_the_classes(own, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "0.png")
    with pytest.raises(DataError, match="2 classes and the network 10"):
        load_infected("own.pth", module="own_net:Net", clean=tmp_path / "images")


def test_a_known_architecture_has_the_channels_of_its_weights(ours, tmp_path):
    for name in range(10):
        (tmp_path / "images" / str(name)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (name, name, name)).save(tmp_path / "images" / str(name) / "0.png")
    model = load_infected(ours, architecture="small_cnn", options=OPTIONS, clean=tmp_path / "images")
    assert model.architecture["in_channels"] == 1
    assert model.clean.images.shape == (10, 1, 8, 8)


def test_what_stands_beside_the_network_in_its_file_is_named(own):
    weights = {f"model.{key}": value for key, value in own.state_dict().items()}
    torch.save({"state_dict": {**weights, "criterion.weight": torch.ones(10)}}, "own.pth")
    model = load_infected("own.pth", module="own_net:Net", clean="digits")
    assert model.facts["unused"] == ["criterion"]


def test_backdoorbench_results_bring_their_architecture_size_and_normalisation(tmp_path):
    network = build("preact_resnet18", num_classes=10, in_channels=3, width=2)
    torch.save(
        {
            "model_name": "preactresnet18",
            "num_classes": 10,
            "model": network.state_dict(),
            "data_path": "data/cifar10",
            "img_size": (8, 8, 3),
            "clean_data": "cifar10",
            "bd_train": {"original_index_array": np.arange(3)},
            "bd_test": {},
        },
        tmp_path / "attack_result.pt",
    )
    for name in range(10):
        (tmp_path / "images" / str(name)).mkdir(parents=True)
        Image.new("RGB", (20, 16), (name, 2 * name, 3)).save(tmp_path / "images" / str(name) / "0.png")
    with pytest.raises(DataError, match="trained on cifar10"):
        load_infected(tmp_path / "attack_result.pt")
    model = load_infected(tmp_path / "attack_result.pt", clean=tmp_path / "images", options={"width": 2})
    assert model.facts["normalised_for"] == "cifar10"
    assert model.clean.images.shape == (10, 3, 8, 8)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in BACKDOORBENCH["cifar10"])
    with torch.no_grad():
        expected = network.eval()((model.clean.images - mean) / std)
        assert torch.allclose(model.network(model.clean.images), expected)
    assert type(model.module) is type(network)


@pytest.mark.parametrize("name", ["resnet18", "resnet18_imagenet"])
def test_a_name_for_two_architectures_is_the_one_whose_names_the_weights_have(name, tmp_path):
    network = build(name, num_classes=7, in_channels=3, width=2)
    torch.save({"module." + key: value for key, value in network.state_dict().items()}, tmp_path / "a.pth")
    clean = torch.rand(4, 3, 16, 16), torch.arange(4)
    model = load_infected(tmp_path / "a.pth", architecture="resnet18", options={"width": 2}, clean=clean)
    assert model.architecture == {"name": name, "num_classes": 7, "in_channels": 3, "width": 2}


def test_a_vgg_of_backdoorbench_has_no_batch_normalisation(tmp_path):
    network = build("vgg16", num_classes=10, in_channels=3, width=2, batch_norm=False, hidden=8)
    torch.save({"model_name": "vgg16", "num_classes": 10, "model": network.state_dict()}, tmp_path / "attack_result.pt")
    clean = torch.rand(4, 3, 32, 32), torch.arange(4)
    model = load_infected(tmp_path / "attack_result.pt", options={"width": 2, "hidden": 8}, clean=clean)
    assert model.architecture["batch_norm"] is False


def test_named_data_sets_are_resized_too(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "splits", lambda name: asked.append(name) or ("train", "test"))
    monkeypatch.setattr(datasets, "split_size", lambda *_: 10)
    monkeypatch.setattr(datasets, "fingerprint", lambda *_: "")
    monkeypatch.setattr(datasets, "num_classes", lambda *_: 2)
    for name in ("some/set", "some/set?label=kind", "some/set?size=8"):
        own_images(name, size=(24, 32))
        all_images(name, size=(24, 32))
    assert asked[::2] == ["some/set?size=24x32", "some/set?label=kind&size=24x32", "some/set?size=8"] == asked[1::2]


@pytest.mark.parametrize("name", ["preactresnet18", "PreActResNet18", "preact-resnet18", "vgg16", "ResNet18"])
def test_the_names_of_others_are_understood(name, ours):
    assert find_architecture(Checkpoint(ours, {}, {"model_name": name}), None) in (
        "preact_resnet18",
        "vgg16",
        "resnet18",
    )


@pytest.mark.slow
def test_long_names_cost_time_and_memory_by_their_length_alone(ours):
    longest = ".".join("a" * 250)
    weights = {f"{number}.{longest}"[:500]: torch.zeros(1) for number in range(50_000)}
    weights |= {f"module.{key}": torch.zeros(1) for key in build("resnet18", 2, 3).state_dict()}
    tracemalloc.start()
    start = time.monotonic()
    assert find_architecture(Checkpoint(ours, weights, {"model_name": "resnet18"}), None) == "resnet18"
    assert time.monotonic() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


class TwoToOne(nn.Module):
    """A network for images in [-1, 1]."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network((x + 1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("preprocess", [Normalise([0.5], [0.5]), lambda x: x.sub_(0.5).mul_(2)])
def test_preprocess_changes_nothing_but_what_the_network_sees(infected, preprocess):
    clean, test = (infected.clean.images, infected.clean.labels), (infected.test.images, infected.test.labels)
    arguments = {"clean": clean, "test": test, "trigger": infected.trigger, "target": infected.target}
    plain = InfectedModel.from_module(infected.network, **arguments)
    shifted = InfectedModel.from_module(TwoToOne(infected.network), preprocess=preprocess, **arguments)
    assert type(shifted.module) is TwoToOne
    assert shifted.evaluate() == plain.evaluate()
    ours, theirs = (repair(model, "onp", 0.05) for model in (plain, shifted))
    assert ours.pruned
    assert theirs.pruned == [f"network.{name}" for name in ours.pruned]
    assert theirs.after == ours.after
    assert type(theirs.module) is TwoToOne
    assert torch.equal(theirs.module.network.linear.weight, ours.network.linear.weight)
    compact = theirs.compact()
    with torch.no_grad():
        small, whole = compact(clean[0]), theirs.network(clean[0])
    assert torch.allclose(small, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        (lambda x: x[:1], "as many|floats"),
        (lambda x: "image", "floats .* not str"),
        (lambda x: x / 0, "finite"),
        (lambda x: x + torch.rand(1), "same each time"),
        (lambda x: x.long(), "floats"),
        (lambda x: x.nothing, "preprocess cannot take images"),
        (Normalise([0.5] * 3, [1.0] * 3), "cannot take images|same each time|network"),
    ],
)
def test_a_preprocess_that_does_something_else_is_refused(infected, preprocess, words):
    with pytest.raises(DataError, match=words):
        InfectedModel.from_module(infected.network, clean=infected.clean, preprocess=preprocess)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([0.5], [0.0]), (["a"], [1.0]), ([], [])])
def test_a_normalisation_has_a_mean_and_a_deviation_a_channel(mean, std):
    with pytest.raises(DataError, match="a channel"):
        Normalise(mean, std)


def test_own_triggers_and_functions_are_not_saved(infected, tmp_path):
    model = InfectedModel.from_module(infected.network, infected.clean, trigger=lambda images: images, target=0)
    model.architecture = infected.architecture
    with pytest.raises(ModelFileError, match="a trigger of your own"):
        model.save(tmp_path / "a")
    model = InfectedModel.from_module(infected.network, infected.clean, preprocess=lambda images: images * 1)
    model.architecture = infected.architecture
    with pytest.raises(ModelFileError, match="Normalise"):
        model.save(tmp_path / "a")
