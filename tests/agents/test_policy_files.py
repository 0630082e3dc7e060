"""A file of a policy may come from anybody: what it says is checked before it is used."""

import copy
import time

import pytest
import torch

from backdoor_gym.agents import ONP
from backdoor_gym.agents.encoder import EncoderOptions
from backdoor_gym.agents.look_ahead import LookAhead
from backdoor_gym.errors import BackdoorGymError, DataError
from backdoor_gym.files.tensors import read_tensors, write_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    ONP(encoder=EncoderOptions(8, 1, 2), look_ahead=LookAhead(), seed=0).save(path)
    return read_tensors(path)


@pytest.fixture
def forged(saved, tmp_path):
    def forge(tensors=None, **fields):
        metadata = copy.deepcopy(saved[1])
        options = fields.pop("options", {})
        metadata.update(fields)
        if isinstance(metadata["encoder"], dict):
            metadata["encoder"]["options"].update(options)
        path = tmp_path / "forged.safetensors"
        write_tensors(path, saved[0] if tensors is None else tensors, metadata)
        return path

    return forge


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder": None},
        {"encoder": [1]},
        {"options": {"x": 1}},
        {"options": {"hidden": "8"}},
        {"options": {"hidden": 8.5}},
        {"options": {"hidden": 10**6}},
        {"options": {"hidden": 10**15}},
        {"options": {"heads": 0}},
        {"options": {"hops": 10**9}},
        {"options": {"ignore": ["nothing"]}},
        {"options": {"message_passing": 1}},
        {"look_ahead": [1]},
        {"look_ahead": {"candidates": 0}},
        {"look_ahead": {"candidates": 2.5}},
        {"look_ahead": {"z": 1}},
        {"threshold": "0.5"},
        {"threshold": 1.5},
        {"verdict_threshold": 0.2},
        {"facts": [1]},
        {"facts": {"timesteps": "x"}},
        {"facts": {"validation": {"timesteps": "x"}}},
        {"more": 1},
    ],
)
def test_each_field_has_a_type_and_a_range(forged, fields):
    path = forged(**fields)
    start = time.perf_counter()
    with pytest.raises(BackdoorGymError) as raised:
        ONP.load(path)
    assert str(raised.value).isprintable()
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_are_finite(forged, saved, value):
    for name, tensor in saved[0].items():
        path = forged({**saved[0], name: torch.full_like(tensor, value)})
        with pytest.raises(BackdoorGymError, match="finite"):
            ONP.load(path)


def test_weights_are_of_the_right_type_and_shape(forged, saved):
    name, tensor = next(iter(saved[0].items()))
    for other in (tensor.double(), tensor[:1], tensor.int()):
        with pytest.raises(BackdoorGymError):
            ONP.load(forged({**saved[0], name: other}))
    with pytest.raises(BackdoorGymError, match="missing"):
        ONP.load(forged({key: value for key, value in saved[0].items() if key != name}))


def test_what_save_writes_load_reads(tmp_path):
    onp = ONP(encoder=EncoderOptions(8, 1, 2), seed=0)
    onp.facts = {"a": float("nan"), "b": [float("inf"), 1]}
    assert ONP.load(onp.save(tmp_path / "policy.safetensors")).facts == {"a": None, "b": [None, 1]}


def test_a_sound_file_is_read(forged):
    assert ONP.load(forged()).look_ahead == LookAhead()


@pytest.mark.parametrize("options", [{"danger_weight": float("nan")}, {"loss_weight": float("inf")}, {"candidates": 0}])
def test_a_look_ahead_has_finite_numbers(options):
    with pytest.raises(DataError):
        LookAhead(**options)


def test_free_texts_keep_their_lines(saved, tmp_path):
    onp = ONP(encoder=EncoderOptions(8, 1, 2), seed=0)
    onp.facts = {"note": "a\nb\x1b[31m"}
    assert ONP.load(onp.save(tmp_path / "p.safetensors")).facts == {"note": "a\nb\ufffd[31m"}
    onp.facts = {"note": {1}}
    with pytest.raises(BackdoorGymError, match="facts of the policy"):
        onp.save(tmp_path / "p.safetensors")
