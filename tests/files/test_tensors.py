import hashlib
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backdoor_gym.errors import ModelFileError
from backdoor_gym.files.tensors import read_tensors, write_tensors


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}, {"answer": [1, "x"]})
    return path


def test_round_trip(path):
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert tensors["b"] == 3
    assert metadata == {"answer": [1, "x"]}


def test_layouts_and_shared_memory_do_not_matter(tmp_path):
    base = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "x", {"a": base, "b": base[:1]}, {})
    tensors, _ = read_tensors(tmp_path / "x")
    assert torch.equal(tensors["a"], base)


def test_nothing_is_left_of_a_write_that_fails(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr("backdoor_gym.files.tensors.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


class Attacker:
    def __reduce__(self):
        return (print, ("executed",))


def test_what_is_not_ours_is_refused_without_executing_it(path, tmp_path, capsys):
    whole = path.read_bytes()
    cases = {
        "truncated": (whole[:-5], "truncated"),
        "flipped": (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        "text": (b"hello, I am no model", "not a readable safetensors"),
        "empty": (b"", "is empty"),
        "pickle": (pickle.dumps(Attacker()), "pickle"),
    }
    for name, (content, words) in cases.items():
        other = tmp_path / f"{name}.safetensors"
        other.write_bytes(content)
        with pytest.raises(ModelFileError, match=words):
            read_tensors(other)
    torch.save({"a": Attacker()}, tmp_path / "zip.safetensors")
    with pytest.raises(ModelFileError, match="could execute code"):
        read_tensors(tmp_path / "zip.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelFileError, match="not written by backdoor-gym"):
        read_tensors(tmp_path / "foreign.safetensors")
    with pytest.raises(ModelFileError, match="no file"):
        read_tensors(tmp_path / "absent.safetensors")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length, tmp_path):
    path = tmp_path / "whole.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, {"text": "", "more": ""})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    text = "x" * (length - header)
    texts = {"text": text[: length // 2], "more": text[length // 2 :]}
    write_tensors(path, {"a": torch.zeros(1)}, texts)
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert {name: read_tensors(path)[1][name] for name in texts} == texts


def rewritten(path, change):
    """The file with its metadata as text changed, and nothing signed anew."""
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        text = file.metadata()["backdoor_gym"]
    save_file(tensors, path, {"backdoor_gym": change(text)})


@pytest.mark.parametrize(
    ("old", "new"), [('"answer": [1', '"answer": [3'), ('"x"', '"X"'), ('"answer"', '"answes"'), ("}", ', "more": 1}')]
)
def test_the_checksum_covers_the_metadata(path, old, new):
    rewritten(path, lambda text: text.replace(old, new))
    with pytest.raises(ModelFileError, match="damaged"):
        read_tensors(path)


def test_the_checksum_covers_dtypes_and_shapes(path):
    for old, new in ((b'"dtype":"F32"', b'"dtype":"I32"'), (b'"shape":[2,3]', b'"shape":[3,2]')):
        content = path.read_bytes()
        assert old in content
        other = path.with_name("other")
        other.write_bytes(content.replace(old, new))
        with pytest.raises(ModelFileError, match="damaged"):
            read_tensors(other)


def old_checksum(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def test_files_of_the_first_version_are_read_with_a_note(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    text = json.dumps({"answer": 1, "checksum": old_checksum(tensors)})
    save_file(tensors, tmp_path / "old", {"backdoor_gym": text})
    with pytest.warns(UserWarning, match="save it anew"):
        assert read_tensors(tmp_path / "old")[1] == {"answer": 1}


@pytest.mark.parametrize("protection", [2, 3, "2", True, None])
def test_a_file_of_the_new_version_never_falls_back_to_the_old_checksum(tmp_path, protection):
    tensors = {"a": torch.arange(4.0)}
    text = json.dumps({"answer": 1, "protection": protection, "checksum": old_checksum(tensors)})
    save_file(tensors, tmp_path / "new", {"backdoor_gym": text})
    with pytest.raises(ModelFileError, match=r"damaged|does not know"):
        read_tensors(tmp_path / "new")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "not JSON"),
        ('{"a": 1e999}', "not JSON"),
        ('{"a": "\\ud800"}', "not JSON"),
        ("[1, 2]", "no object"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "levels deep"),
        ('{"a": ' + "[" * 100_000, "not JSON"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "characters of metadata"),
    ],
)
def test_metadata_are_json_of_bounded_size_and_depth(tmp_path, text, said):
    save_file({"a": torch.zeros(1)}, tmp_path / "file", {"backdoor_gym": text})
    with pytest.raises(ModelFileError, match=said):
        read_tensors(tmp_path / "file")
