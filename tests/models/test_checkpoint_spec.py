import inspect
from dataclasses import fields

import pytest

from backdoor_gym import load_infected
from backdoor_gym.cli.own_network import OwnNetwork
from backdoor_gym.errors import DataError
from backdoor_gym.models.catalogue import is_foreign
from backdoor_gym.models.checkpoint_spec import CheckpointSpec


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": 3}, "architecture must be a name or None"),
        ({"timm": 3}, "timm must be a name or None"),
        ({"options": 3}, "options must be a dict or None"),
        ({"options": {3: 1}}, "a name in options must be a text"),
        ({"preprocess": 3}, "preprocess must be a function or None"),
    ],
)
def test_arguments_of_wrong_types_are_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        CheckpointSpec(**arguments)


def test_what_was_said():
    assert CheckpointSpec(options={}).said == []
    assert CheckpointSpec(options={"width": 8}, clean="digits").said == ["options", "clean"]
    with pytest.raises(DataError, match="brings no images"):
        CheckpointSpec().check_clean("my.pth")


def test_the_public_arguments_and_the_options_are_those_of_the_specification():
    public = [
        name for name, part in inspect.signature(load_infected).parameters.items() if part.kind is part.KEYWORD_ONLY
    ]
    assert public == [field.name for field in fields(CheckpointSpec)]
    options = {field.name for field in fields(OwnNetwork)}
    assert options - {"width", "arch_option", "mean", "std"} == set(public) - {"options", "preprocess"}


def test_the_texts_of_a_command_as_values():
    network = OwnNetwork("vgg11", 8, ["hidden=4", "note=x"], image_size="24x32", mean="0.5,1", std="1,2", timm=None)
    spec = network.spec()
    assert spec.options == {"hidden": 4, "note": "x", "width": 8}
    assert spec.image_size == (24, 32)
    assert spec.preprocess.state() == {"mean": [0.5, 1], "std": [1, 2]}
    assert OwnNetwork().spec().said == []


def test_whose_weights_they_are(infected_file, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    for name in ("hf:owner/name", str(tmp_path / "folder")):
        assert is_foreign(name, CheckpointSpec())
    for name in ("digits-badnets", "digits-train/*", str(infected_file), str(tmp_path), "nowhere.pth"):
        assert not is_foreign(name, CheckpointSpec(clean="digits"))
