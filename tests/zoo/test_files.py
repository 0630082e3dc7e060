import pickle

import pytest
import torch
from safetensors.torch import save_file

from backdoor_gym.errors import ModelFileError
from backdoor_gym.zoo.files import read_tensors, write_tensors


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
    monkeypatch.setattr("backdoor_gym.zoo.files.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
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
        "empty": (b"", "not a readable safetensors"),
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
    path, text = tmp_path / "whole.safetensors", ""
    write_tensors(path, {"a": torch.zeros(1)}, {"text": text})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    text = "x" * (length - header)
    write_tensors(path, {"a": torch.zeros(1)}, {"text": text})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert read_tensors(path)[1]["text"] == text
