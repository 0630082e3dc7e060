import argparse
import bz2
import gzip
import json
import lzma
import os
import tarfile
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from backdoor_gym import load_infected
from backdoor_gym.errors import ModelFileError
from backdoor_gym.files.checkpoints import read_checkpoint
from backdoor_gym.files.fitting import fit_weights
from backdoor_gym.files.tensors import MOST_HEADER

from .conftest import Net, prefixed


class ExecutedError(Exception):
    pass


def execute(*_):
    raise ExecutedError


class Attacker:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


#: What people save, made of a network.
KINDS = {
    "a state dict": lambda net: net.state_dict(),
    "of DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "of torch.compile in a Lightning module": lambda net: {
        "state_dict": prefixed("model._orig_mod.", net.state_dict())
    },
    "wrapped, with an optimiser": lambda net: {
        "epoch": 3,
        "state_dict": net.state_dict(),
        "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
    },
    "wrapped twice": lambda net: {"model": {"state_dict": net.state_dict(), "epoch": 1}},
    "under a name of its own": lambda net: {"victim": net.state_dict(), "acc": 93.5},
    "a classifier beside a generator": lambda net: {"netC": net.state_dict(), "netG": nn.Linear(1, 1).state_dict()},
    "without counters": lambda net: {
        k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")
    },
    "with objects of other libraries": lambda net: {
        "net": net.state_dict(),
        "acc": np.float64(0.9),
        "args": argparse.Namespace(lr=0.1),
        "picture": Image.new("RGB", (2, 2)),
    },
    "between numbers, texts and dicts": lambda net: {
        "epoch": 5,
        "best": 0.9,
        "note": "final",
        "nothing": None,
        "hyper": {"lr": 0.1, "milestones": [1, 2]},
        "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
        **net.state_dict(),
    },
    "the same in a wrapper, beside poisoned images": lambda net: {
        "state_dict": {**net.state_dict(), "epoch": 5},
        "bd_test": {"x": torch.zeros(1), "y": torch.zeros(1)},
    },
    "with a copy of a few of its tensors": lambda net: {**net.state_dict(), "trigger": {"mask": torch.ones(3, 3)}},
    "with tensors beside the wrapper": lambda net: {"victim": net.state_dict(), "weights_of_classes": torch.ones(2)},
    "with the loss of a Lightning module": lambda net: {
        "state_dict": {
            **prefixed("model.", net.state_dict()),
            "criterion.weight": torch.ones(2),
            "loss_fn.weight": torch.ones(2),
            "ce.weight": torch.ones(2),
            "val_acc.correct": torch.tensor(3),
            "train_f1.tp": torch.zeros(2),
            "confusion.matrix": torch.zeros(2, 2).long(),
            "num_batches": torch.tensor(4),
            "optimizer.exp_avg.0": torch.ones(4, 1, 3, 3),
        }
    },
    "of AveragedModel": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "of AveragedModel in a Lightning module": lambda net: {
        **prefixed("module.model.", net.state_dict()),
        "module.criterion.weight": torch.ones(2),
        "n_averaged": torch.tensor(5),
    },
    "without a prefix beside a loss and counters": lambda net: {
        **net.state_dict(),
        "criterion.weight": torch.ones(2),
        "accuracy.correct": torch.tensor(0.5),
        "rate": torch.tensor(0.1),
        "n_averaged": torch.tensor(5),
    },
    "with other averages": lambda net: {
        **prefixed("ema.", {key: 0 * value for key, value in net.state_dict().items()}),
        **prefixed("model.", net.state_dict()),
        **prefixed("model_ema.module.", {key: 0 * value for key, value in net.state_dict().items()}),
    },
    "with averages under another key": lambda net: {
        "state_dict": net.state_dict(),
        "state_dict_ema": {key: 0 * value for key, value in net.state_dict().items()},
    },
    "the whole network": lambda net: net,
    "the whole network, wrapped": lambda net: {"model": net, "epoch": 1},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_people_save_is_read_whatever_its_name(kind, suffix, trained, tmp_path):
    torch.save(KINDS[kind](trained), tmp_path / f"it{suffix}")
    network = Net()
    fit_weights(network, read_checkpoint(tmp_path / f"it{suffix}"))
    for name, value in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_safetensors_of_anybody_and_old_torch_files_are_read(trained, tmp_path):
    save_file(trained.state_dict(), tmp_path / "a")
    torch.save({"net": trained.state_dict()}, tmp_path / "b", _use_new_zipfile_serialization=False)
    for name in "ab":
        network = Net()
        fit_weights(network, read_checkpoint(tmp_path / name))
        assert torch.equal(network.deep[1].weight, trained.deep[1].weight)


def test_backdoorbench_results_say_what_they_are(trained, tmp_path):
    poisoned = {
        "bd_data_container": {
            "save_folder_path": "record/x",
            "data_dict": {3: {"path": "record/x/3.png", "other_info": [0, 7]}, 5: (Image.new("RGB", (4, 4)), 0, 7)},
        },
        "original_index_array": np.arange(8),
        "poison_indicator": np.zeros(8),
    }
    result = {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": trained.state_dict(),
        "data_path": "data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": poisoned,
        "bd_test": {"x": torch.zeros(2, 3, 32, 32), "y": torch.zeros(2)},
    }
    torch.save(result, tmp_path / "attack_result.pt")
    read = read_checkpoint(tmp_path / "attack_result.pt")
    assert read.facts == {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "clean_data": "cifar10",
        "img_size": (32, 32, 3),
    }
    assert set(read.weights) == set(trained.state_dict())
    assert "PIL.Image.Image" in read.unread


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_nothing_in_a_file_is_ever_run(trained, tmp_path, protocol, whole):
    attacker = Attacker(execute)
    torch.save(
        attacker if whole else {"net": trained.state_dict(), "x": attacker}, tmp_path / "a", pickle_protocol=protocol
    )
    with pytest.raises(ExecutedError):
        torch.load(tmp_path / "a", weights_only=False)
    try:
        read = read_checkpoint(tmp_path / "a")
    except ModelFileError:
        assert whole or protocol == 4  # the reader takes protocol 2 alone
    else:
        assert read.unread == (f"{__name__}.execute",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_calls_the_system_is_refused(trained, tmp_path, zipped):
    torch.save(
        {"net": trained.state_dict(), "x": Attacker(os.system, f"touch {tmp_path}/executed")},
        tmp_path / "a",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ModelFileError, match=r"without running what it holds.*\.system"):
        read_checkpoint(tmp_path / "a")
    assert not (tmp_path / "executed").exists()


def test_files_without_weights_are_refused(trained, tmp_path):
    whole = tmp_path / "whole"
    torch.save(trained.state_dict(), whole)
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script")
    (tmp_path / "truncated").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text").write_text("weights, honestly")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "empty")
    torch.save({"ema": trained.state_dict(), "raw": trained.state_dict()}, tmp_path / "two")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"net": {}, "x": np.float64(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name, words in (
        ("script", "TorchScript"),
        ("truncated", "damaged"),
        ("text", "no file of weights"),
        ("empty", "no state dict.*only epoch, lr"),
        ("two", r"several sets of weights \(ema, raw\)"),
        ("list", "no state dict"),
        ("old", r"it names numpy.*save its state_dict\(\) alone"),
        ("absent", "no file"),
    ):
        with pytest.raises(ModelFileError, match=words):
            read_checkpoint(tmp_path / name)


def module_of(children):
    """A pickled module's state without its class."""
    module = nn.Module()
    module._modules.update(children)
    return module


def test_files_that_hold_themselves_or_claim_more_than_they_store_are_refused(tmp_path):
    inside = {}
    inside["model"] = inside
    shared = module_of({})
    shared.weight = nn.Parameter(torch.ones(1))
    for _ in range(24):  # 2 to the power of 24 names
        shared = module_of({"a": shared, "b": shared})
    for content in (inside, shared, {"weight": torch.ones(1).expand(10**9)}):
        torch.save(content, tmp_path / "hostile.pt")
        with pytest.raises(ModelFileError, match="damaged"):
            read_checkpoint(tmp_path / "hostile.pt")


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"state_dict": weights, "epoch": 1}])
@pytest.mark.parametrize(
    "weights",
    [
        {"fc.scale": torch.tensor(1.0), "fc._packed_params._packed_params": (torch.zeros(2, 2), torch.zeros(2))},
        {
            "conv.weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
            "conv.scale": torch.tensor(1.0),
        },
    ],
)
def test_quantised_networks_are_named_as_such(weights, wrap, tmp_path):
    torch.save(wrap(weights), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"quantised network \((fc\._packed|conv\.weight)"):
        read_checkpoint(tmp_path / "a.pt")


def test_archives_are_to_be_unpacked(trained, tmp_path):
    weights = tmp_path / "attack_result.pt"
    torch.save(trained.state_dict(), weights)
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.write(weights, "a/b/attack_result.pt")
    with zipfile.ZipFile(tmp_path / "nested", "w") as file:
        file.write(tmp_path / "zip", "inner.zip")
    with zipfile.ZipFile(tmp_path / "unpacked.pt", "w") as file:  # somebody packed what was in two torch files
        file.writestr("a/b/data.pkl", b"")
    for name, mode in (("tar", "w"), ("tar.gz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")):
        with tarfile.open(tmp_path / name, mode) as file:
            file.add(weights, "a/attack_result.pt")
    for name, module in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        with module.open(tmp_path / name, "wb") as file:
            file.write(weights.read_bytes())
    (tmp_path / "7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(40))
    (tmp_path / "rar.pth").write_bytes(b"Rar!\x1a\x07" + bytes(40))
    for file in tmp_path.iterdir():
        if file != weights:
            with pytest.raises(ModelFileError, match=r"unpack it first.*attack_result"):
                read_checkpoint(file)
            with pytest.raises(ModelFileError, match="unpack it first"):
                load_infected(file)
    fit_weights(Net(), read_checkpoint(weights))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "F4", "U16", "F6_E2M3", "C64", "X9"])
def test_numbers_that_safetensors_knows_and_torch_may_not(tmp_path, dtype):
    tensors = {
        "w": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]},
        "v": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
    }
    header = json.dumps(tensors)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with suppress(ModelFileError):  # and nothing else
        assert set(read_checkpoint(tmp_path / "a.safetensors").weights) == {"v", "w"}


def test_headers_are_bearable(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(
        (2 * MOST_HEADER).to_bytes(8, "little") + b"{" + b" " * (2 * MOST_HEADER - 2) + b"}"
    )
    with pytest.raises(ModelFileError, match="is the most"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [2**63, 10**9, 100])
def test_headers_are_no_longer_than_the_file(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 20)
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path / "a.safetensors")
