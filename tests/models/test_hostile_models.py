"""What a model's file says is data until it is checked: types, ranges, sizes, names."""

import copy
import dataclasses
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from backdoor_gym import InfectedModel, load_infected, repair
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.errors import BackdoorGymError, DataError, ModelFileError, WeightsError
from backdoor_gym.files.schemas import MOST_TEXT
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.models.infected_files import FORMAT
from backdoor_gym.networks import build


@pytest.fixture
def forged(infected_file, tmp_path):
    """Writes the file of a model with other metadata or tensors, signed as the package does it."""

    def forge(change=lambda metadata: None, **tensors):
        stored, metadata = read_tensors(infected_file)
        metadata = copy.deepcopy(metadata)
        change(metadata)
        path = tmp_path / "forged.safetensors"
        write_tensors(path, {**stored, **tensors}, metadata)
        return path

    return forge


@pytest.mark.parametrize(
    "fields",
    [
        {"name": 5},
        {"name": None},
        {"name": "x" * 100_000},
        {"facts": []},
        {"facts": {"a": {"b": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}}},
        {"architecture": "resnet18"},
        {"architecture": {"name": "resnet18", "num_classes": 2**40, "in_channels": 1}},
        {"architecture": {"name": "resnet18", "num_classes": 10.5, "in_channels": 1}},
        {"architecture": {"name": ["resnet18"], "num_classes": 10, "in_channels": 1}},
        {"target": "3"},
        {"target": -1},
        {"target": 3.5},
        {"data": {}},
        {"data": {"clean": {"dataset": "digits"}}},
        {"data": {"clean": {"dataset": "digits", "split": "../x", "fingerprint": "0" * 16}}},
        {"data": {"clean": {"dataset": "digits", "split": "all", "fingerprint": 5}}},
        {"normalise": {"mean": [0.5], "std": []}},
        {"normalise": {"mean": [0.5], "std": [0.0]}},
        {"normalise": {"mean": ["a"], "std": [1.0]}},
        {"trigger": {"attack": "badnets"}},
        {"trigger": {"attack": "badnets", "parameters": {"row": "1", "column": 2}}},
        {"trigger": {"attack": "badnets", "parameters": {"row": 1.5, "column": 2}}},
        {"trigger": {"attack": "badnets", "parameters": {"row": -1, "column": 2}}},
        {"trigger": {"attack": "badnets", "parameters": {"row": 8, "column": 2}}},
        {"trigger": {"attack": "multi-trigger", "parameters": {"triggers": "x"}}},
        {"trigger": {"attack": "multi-trigger", "parameters": {"triggers": [{"attack": "sig"}]}}},
        {"more": 1},
    ],
)
def test_each_field_has_a_type_and_a_range(forged, fields):
    path = forged(lambda metadata: metadata.update(fields))
    with pytest.raises(BackdoorGymError) as raised:
        load_infected(path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "small_cnn", "blocks": 10**6},
        {"name": "mlp", "depth": 10**6, "image_size": 8},
        {"name": "vit", "depth": 10**6, "image_size": 8},
        {"name": "convnext", "depth": 10**6},
        {"name": "resnet18", "width": 10**6},
        {"name": "mlp", "width": 10**6, "image_size": 10**4},
    ],
)
def test_a_network_is_never_made_larger_than_what_the_file_holds(forged, spec):
    described = {"num_classes": 10, "in_channels": 1, **spec}
    path = forged(lambda metadata: metadata.update(architecture=described))
    start = time.perf_counter()
    with pytest.raises(BackdoorGymError):
        load_infected(path)
    assert time.perf_counter() - start < 10


def test_texts_of_a_file_come_out_printable(forged):
    evil = "a\x1b]0;title\x07\nerror: all is well"
    model = load_infected(forged(lambda metadata: metadata.update(name=evil, facts={evil: [evil, {"a": evil}]})))
    for text in (model.name, str(model.facts)):
        assert text.isprintable()
    assert load_infected(forged(lambda metadata: metadata.update(name=" "))).name == "unnamed"


@pytest.mark.parametrize(
    "name",
    ["pandas", "text", "./f", "/etc", "~/f", "a/b/c", "https://evil/x", "..", "owner/name?x=1&size=1", "digits?size=9"],
)
def test_data_sets_that_a_file_names_are_no_paths_and_no_builders(forged, name, tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("backdoor_gym.data.hub.load", lambda *_: pytest.fail("the data set was asked for"))
    path = forged(lambda metadata: metadata["data"]["clean"].update(dataset=name))
    with pytest.raises(BackdoorGymError):
        load_infected(path)


def test_a_folder_that_is_called_as_the_data_set_of_a_file_is_not_opened(forged, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = forged(lambda metadata: metadata["data"]["clean"].update(dataset="owner/name"))
    with pytest.raises(DataError, match="--data"):
        load_infected(path)


def test_another_data_set_may_be_named_instead(forged):
    path = forged(
        lambda metadata: [role.update(dataset="/home/somebody/pictures") for role in metadata["data"].values()]
    )
    with pytest.raises(DataError, match="--data"):
        load_infected(path)
    assert len(load_infected(path, "digits").clean) == 100


def test_weights_are_of_the_kind_that_the_network_has(forged, infected_file):
    name = next(key for key in read_tensors(infected_file)[0] if key.endswith("0.weight"))
    weight = read_tensors(infected_file)[0][name]
    with pytest.raises(WeightsError, match="int32"):
        load_infected(forged(**{name: weight.int()}))


def test_a_trigger_is_made_of_finite_floats(forged, infected_file):
    patch = read_tensors(infected_file)[0]["trigger.patch"]
    for other in (patch.double(), torch.full_like(patch, torch.nan)):
        with pytest.raises(ModelFileError, match="finite"):
            load_infected(forged(**{"trigger.patch": other}))


@pytest.mark.parametrize("shape", [(1, 0, 3), (1, 3, 0), (0, 3, 3), (0,), ()])
def test_a_patch_has_rows_and_columns(forged, shape):
    with pytest.raises((DataError, ModelFileError), match="trigger"):
        load_infected(forged(**{"trigger.patch": torch.ones(shape)}))


def test_variances_below_zero_are_refused(infected):
    network = copy.deepcopy(infected.network)
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.running_var[0] = -0.5
    with pytest.raises(WeightsError, match="below zero"):
        InfectedModel.from_module(network, (infected.clean.images, infected.clean.labels))


def test_weights_that_are_finite_and_overflow_are_refused():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    torch.nn.init.constant_(network[1].weight, 3e38)
    with pytest.raises(WeightsError, match="not finite"):
        InfectedModel.from_module(network, (torch.rand(6, 1, 8, 8), torch.arange(6) % 3))


def test_sizes_are_bounded_on_the_way_and_not_at_the_end():
    from backdoor_gym.files.sizes import within

    made = 0

    def make():
        nonlocal made
        network = torch.nn.Sequential()
        for _ in range(100_000):
            made += 1
            network.append(torch.nn.Linear(2, 2))
        return network

    with pytest.raises(WeightsError, match="more parameters"):
        within(make, {"a": torch.zeros(1)})
    assert made < 2000
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_the_work_of_making_a_network_is_bounded(monkeypatch):
    from backdoor_gym.files.sizes import within

    monkeypatch.setattr("backdoor_gym.files.sizes.FEW_CALLS", 10_000)
    done = 0

    def make():
        nonlocal done
        for number in range(10**7):
            done = abs(number)
        return torch.nn.Identity()

    before = sys.getprofile()
    with pytest.raises(WeightsError, match="more steps of its making"):
        within(make, {})
    assert done < 10_000
    assert sys.getprofile() is before


def test_a_pass_of_what_a_small_file_describes_takes_bearable_memory(tmp_path):
    """Attention over all pairs of the 256 x 256 places in an image."""
    described = {"name": "vit", "num_classes": 3, "in_channels": 1, "width": 4, "depth": 1, "heads": 1}
    images = LabelledImages(torch.rand(3, 1, 256, 256), torch.arange(3))

    def written(**options):
        spec = {**described, **options}
        weights = {f"network.{key}": value for key, value in build(**spec).state_dict().items()}
        path = tmp_path / "vit.safetensors"
        metadata = {
            "format": FORMAT,
            "name": "a",
            "architecture": spec,
            "target": None,
            "facts": {},
            "data": {"clean": {}},
        }
        write_tensors(path, {**weights, "clean.images": images.images, "clean.labels": images.labels}, metadata)
        return path

    assert load_infected(written(image_size=256, patch=32)).num_classes == 3
    with pytest.raises(WeightsError, match="would take 8,590,"):
        load_infected(written(image_size=256, patch=1))


def test_images_are_named_once_and_nothing_else_is_held(forged, infected_file):
    indices = read_tensors(infected_file)[0]["clean.indices"]
    with pytest.raises(ModelFileError, match="several times"):
        load_infected(forged(**{"clean.indices": torch.cat([indices, indices])}))
    with pytest.raises(ModelFileError, match="holds foo"):
        load_infected(forged(**{"foo.bar": torch.zeros(1)}))


def test_free_texts_keep_their_lines_and_nothing_that_acts(infected, tmp_path, run):
    facts = {"note": "one\r\ntwo\n", "a\nb": ["c\x1b[31m", {"d": "\t\u202e"}], 3: "x" * MOST_TEXT}
    kept = {"note": "one\ntwo\n", "a b": ["c\ufffd[31m", {"d": "\ufffd\ufffd"}], "3": "x" * MOST_TEXT}
    once = load_infected(dataclasses.replace(infected, facts=facts).save(tmp_path / "once.safetensors"))
    assert once.facts == kept
    assert load_infected(once.save(tmp_path / "twice.safetensors")).facts == kept
    out = run("inspect", tmp_path / "once.safetensors")[1]
    assert "one two" in out
    assert len(out) < 20_000
    for wrong in ({"a": "x" * (MOST_TEXT + 1)}, {"a\x1b": 1, "a\x1c": 2}, {"a": torch.zeros(1)}, {"a": {1}}, [1]):
        with pytest.raises(ModelFileError, match="facts of the model"):
            dataclasses.replace(infected, facts=wrong).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ModelFileError, match="cannot be described"):
        dataclasses.replace(infected, architecture={**infected.architecture, "x": {1}}).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "wrong.safetensors").exists()


def test_images_in_a_file_are_measured_before_they_are_read(infected, forged, tmp_path, monkeypatch):
    images, labels = infected.clean.images.clone(), infected.clean.labels
    held = dataclasses.replace(infected, clean=LabelledImages(images, labels), test=None)
    path = held.save(tmp_path / "held.safetensors")
    monkeypatch.setattr("backdoor_gym.models.infected_files.MOST_HELD", images.nbytes - 1)
    monkeypatch.setattr("backdoor_gym.files.tensors._checksum", lambda *_: pytest.fail("the tensors were read"))
    for act in (lambda: load_infected(path), lambda: held.save(path)):
        with pytest.raises(ModelFileError, match="the images that a model's file holds may take"):
            act()
    monkeypatch.undo()
    for shape in ((1, 1, 1025, 8), (1, 1, 8, 1025)):
        with pytest.raises(ModelFileError, match="pixels a side"):
            load_infected(forged(**{"clean.images": torch.zeros(shape)}))


def test_a_repair_of_a_model_that_no_file_can_hold_is_kept_all_the_same(infected, tmp_path):
    model = dataclasses.replace(infected, trigger=lambda images: 1 - images)
    result = repair(model, "random", None, max_steps=1)
    assert not result.complete
    assert load_file(result.save(tmp_path)[0]).keys() == infected.module.state_dict().keys()
    assert "load_state_dict" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_save_writes_load_reads(infected, tmp_path):
    facts = {"a": float("nan"), "b": float("inf"), "c": "x"}
    odd = dataclasses.replace(infected, name="n\ud800\x1b" + "x" * 600, facts=facts)
    again = load_infected(odd.save(tmp_path / "odd.safetensors"))
    assert again.facts == {"a": None, "b": None, "c": "x"}
    assert again.name.isprintable()
    deep = [1]
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ModelFileError, match="levels deep"):
        dataclasses.replace(infected, facts={"a": deep}).save(tmp_path / "deep.safetensors")


@pytest.mark.parametrize("dataset", ["a/..", "a/.", "a/b/.."])
def test_no_name_of_a_data_set_leads_out_of_its_folder(forged, dataset, tmp_path, monkeypatch):
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.setenv("BACKDOOR_GYM_DATA", str(tmp_path / "data"))
    path = forged(lambda metadata: metadata["data"]["clean"].update(dataset=dataset))
    with pytest.raises(DataError, match="--data"):
        load_infected(path)
