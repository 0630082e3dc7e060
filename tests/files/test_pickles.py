import pickle
import struct
import time
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym.errors import ModelFileError
from backdoor_gym.files.checkpoints import read_checkpoint
from backdoor_gym.files.tensors import MOST_NAME, MOST_TENSORS

HEAD = b"\x80\x02"


def text(said):
    return b"X" + struct.pack("<I", len(said)) + said.encode()


def whole(number):
    return b"J" + struct.pack("<i", number)


def large(number):
    size = (number.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def shape(*lengths):
    return b"(" + b"".join(map(large, lengths)) + b"t"


def stored(count, kind="FloatStorage"):
    return b"(" + text("storage") + named("torch", kind) + text("0") + text("cpu") + large(count) + b"tQ"


def rebuilt(storage, offset, size, strides):
    return (
        named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + large(offset) + size + strides + b"\x89"
        + named("collections", "OrderedDict") + b")RtR"
    )  # fmt: skip


def in_zip(path, pickled, records=(), packed=False):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3")
        archive.writestr("a/byteorder", "little")
        for key, content in dict(records).items():
            archive.writestr(f"a/data/{key}", content)
    return path


def before_zips(path, pickled, storages=b""):
    """A file as torch before 1.6 wrote it."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = (pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps(facts, 2), pickled)
    path.write_bytes(b"".join(parts) + pickle.dumps(["0"], 2) + storages)
    return path


def refused(path, words):
    start = time.monotonic()
    with pytest.raises(ModelFileError, match=words) as told:
        read_checkpoint(path)
    assert time.monotonic() - start < 10
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "call",
    [
        named("builtins", "bytearray") + large(10**12) + b"\x85R",
        named("__builtin__", "bytearray") + large(10**12) + b"\x85R",
        named("torch", "Tensor") + shape(10**6, 10**6) + b"R",
        named("torch", "Tensor") + shape(10**6, 10**6) + b"\x81",
        named("torch", "FloatTensor") + shape(10**6, 10**6) + b"R",
        named("torch.storage", "UntypedStorage") + large(10**12) + b"\x85R",
        named("torch.storage", "TypedStorage") + large(10**12) + b"\x85R",
        named("torch._utils", "_rebuild_device_tensor_from_cpu_tensor") + b")R",
        named("torch._utils", "_rebuild_wrapper_subclass") + b")R",
        named("torch._tensor", "_rebuild_from_type_v2") + b"(" + named("torch", "Tensor") + named("torch", "Tensor")
        + shape(10**6, 10**6) + b"}tR",
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [in_zip, before_zips])
def test_calls_that_no_weights_need_are_not_made(tmp_path, call, write):
    refused(write(tmp_path / "a.pt", HEAD + call + b"."), "which no weights need")


@pytest.mark.parametrize(
    ("offset", "size", "strides"),
    [
        (0, shape(10**12), shape(1)),
        (0, shape(5), shape(1)),
        (1, shape(4), shape(1)),
        (0, shape(2, 2), shape(4, 1)),
        (0, shape(2), shape(-1)),
        (-1, shape(2), shape(1)),
        (0, shape(2), shape(1, 1)),
        (0, shape(*[1] * 65), shape(*[1] * 65)),
    ],
)
@pytest.mark.parametrize("write", [in_zip, before_zips])
def test_tensors_lie_in_their_storage(tmp_path, offset, size, strides, write):
    pickled = HEAD + b"}" + text("w") + rebuilt(stored(4), offset, size, strides) + b"s."
    storages = {"0": bytes(16)} if write is in_zip else struct.pack("<q", 4) + bytes(16)
    refused(write(tmp_path / "a.pt", pickled, storages), "damaged")


def test_an_expanded_tensor_is_not_spelled_out(tmp_path):
    pickled = HEAD + b"}" + text("w") + rebuilt(stored(4), 0, shape(10**6, 10**6), shape(0, 0)) + b"s."
    refused(in_zip(tmp_path / "a.pt", pickled, {"0": bytes(16)}), "w is larger than what is stored of it")


def test_storages_are_as_large_as_their_records(tmp_path):
    pickled = HEAD + b"}" + text("w") + rebuilt(stored(10**9), 0, shape(4), shape(1)) + b"s."
    refused(in_zip(tmp_path / "a.pt", pickled, {"0": bytes(16)}), "a storage is larger")
    refused(in_zip(tmp_path / "b.pt", pickled), "a storage is larger")
    refused(before_zips(tmp_path / "c.pt", pickled, struct.pack("<q", 4) + bytes(16)), "are larger than what is stored")


def test_a_tensor_keeps_its_storage(tmp_path):
    other = b"(" + stored(4) + large(0) + shape(10**10) + shape(1) + b"t"
    pickled = HEAD + rebuilt(stored(4), 0, shape(4), shape(1)) + other + b"b."
    refused(before_zips(tmp_path / "a.pt", pickled, struct.pack("<q", 4) + bytes(16)), "another storage")


def test_quantised_tensors_are_not_made_larger_than_what_is_stored(tmp_path):
    scheme = b"(" + named("torch", "per_tensor_affine") + b"G" + struct.pack(">d", 0.1) + large(0) + b"t"
    pickled = (
        HEAD + named("torch._utils", "_rebuild_qtensor") + b"(" + stored(4, "QInt8Storage") + large(0) + shape(10**12) + shape(0)
        + scheme + b"\x89" + named("collections", "OrderedDict") + b")RtR."
    )  # fmt: skip
    refused(in_zip(tmp_path / "a.pt", pickled, {"0": bytes(4)}), "quantised tensor is larger")


def test_copies_are_counted(tmp_path):
    numbers = b"](" + b"K\x01" * 200_000 + b"eq\x00"
    pickled = HEAD + numbers + (named("builtins", "set") + b"h\x00\x85R0") * 1000 + b"."
    refused(in_zip(tmp_path / "a.pt", pickled.replace(b"R0", b"R")), "again and again")


def test_a_tuple_of_tuples_is_not_looked_up_for_ever(tmp_path):
    tower = b")" + b"".join(b"q%b h%b\x86".replace(b" ", b"") % (bytes([level]), bytes([level])) for level in range(60))
    refused(in_zip(tmp_path / "a.pt", HEAD + b"}" + tower + b"K\x01s."), "again and again")
    refused(in_zip(tmp_path / "b.pt", HEAD + named("builtins", "set") + b"](" + tower + b"e\x85R."), "again and again")


def test_integers_that_collide_are_counted(tmp_path):
    pairs = b"".join(large(number * (2**61 - 1)) + b"K\x01" for number in range(1, 3000))
    refused(in_zip(tmp_path / "a.pt", HEAD + b"}(" + pairs + b"u."), "integers of no usual size")


@pytest.mark.slow
def test_endless_pickles_are_left(tmp_path):
    refused(in_zip(tmp_path / "a.pt", HEAD + b"](" + b"N" * 3_000_000 + b"e."), "far more beside its weights")
    names = b"".join(named("some.module", f"Name{number}") for number in range(20_000))
    refused(in_zip(tmp_path / "b.pt", HEAD + b"](" + names + b"e."), "far more beside its weights")


@pytest.mark.slow
def test_deep_nesting_is_no_crash(tmp_path):
    refused(in_zip(tmp_path / "a.pt", HEAD + b"]" * 100_000 + b"a" * 99_999 + b"."), "no state dict")
    deep = b"".join(b"}" + text("model") for _ in range(5000))
    refused(in_zip(tmp_path / "b.pt", HEAD + deep + b"}" + b"s" * 5000 + b"."), "not put together")


def test_packed_and_overlapping_records_are_refused(tmp_path):
    pickled = HEAD + b"}" + text("w") + rebuilt(stored(10**7), 0, shape(10**7), shape(1)) + b"s."
    refused(in_zip(tmp_path / "a.pt", pickled, {"0": bytes(4 * 10**7)}, packed=True), "torch packs nothing")
    path = in_zip(tmp_path / "b.pt", HEAD + b"}.", {"0": bytes(10**5)})
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")
    entry, ending = content[start : content.index(b"PK\x05\x06")], bytearray(content[content.index(b"PK\x05\x06") :])
    more = b"".join(entry.replace(b"a/data/0", b"a/data/" + bytes([number])) for number in range(ord("1"), ord("9")))
    struct.pack_into("<HHI", ending, 8, 4 + 8, 4 + 8, struct.unpack_from("<I", ending, 12)[0] + len(more))
    path.write_bytes(content[: start + len(entry)] + more + ending)
    refused(path, "in a file of")


def test_two_readers_find_the_same_directory(tmp_path):
    path = in_zip(tmp_path / "a.pt", HEAD + b"}.")
    path.write_bytes(path.read_bytes() + path.read_bytes())
    refused(path, "one directory")


def test_a_zip_behind_a_pickle_is_not_taken_for_the_file(tmp_path):
    call = HEAD + named("builtins", "bytearray") + large(10**12) + b"\x85R."
    path = before_zips(tmp_path / "a.pt", call)
    path.write_bytes(path.read_bytes() + in_zip(tmp_path / "b.pt", HEAD + b"}.").read_bytes())
    refused(path, "bytearray")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10, 60])
def test_what_breaks_off_is_damaged(tmp_path, length):
    pickled = HEAD + b"}" + text("w") + rebuilt(stored(4), 0, shape(4), shape(1)) + b"s."
    refused(in_zip(tmp_path / "a.pt", pickled[:length], {"0": bytes(16)}), "damaged")


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "meta": torch.empty(3, device="meta"),
            "coo": torch.ones(3, 3).to_sparse(),
            "csr": torch.ones(3, 3).to_sparse_csr(),
            "csc": torch.ones(3, 3).to_sparse_csc(),
            "bsr": torch.ones(4, 4).to_sparse_bsr((2, 2)),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        }


@pytest.mark.parametrize("kind", odd_tensors())
def test_tensors_of_other_kinds_are_named(tmp_path, kind):
    torch.save({"layer.weight": torch.ones(2), "layer.odd": odd_tensors()[kind]}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "layer.odd|_rebuild_nested_tensor")


def test_what_training_code_saves_is_read(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 1, 5, 5)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    shared = torch.arange(12.0)
    content = {
        "state_dict": OrderedDict(network.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": (torch.get_rng_state(), np.random.default_rng(0).bit_generator.state, np.float64(0.5)),
        "seen": {1, 2, 3},
        "counts": Counter("abc"),
        "views": [shared[2:5], shared.view(3, 4).T, shared.expand(2, 12), torch.ones(0, 3)],
        "other": [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.complex64, torch.bool, torch.uint16)],
    }
    for old in (False, True):
        path = tmp_path / f"{old}.pt"
        plain = {key: value for key, value in content.items() if not old or key not in ("random", "other")}
        torch.save(plain, path, _use_new_zipfile_serialization=not old)
        found = read_checkpoint(path).weights
        assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())
    torch.save(network, tmp_path / "whole.pt")
    assert read_checkpoint(tmp_path / "whole.pt").weights.keys() == dict(network.state_dict()).keys()


def test_names_are_counted_and_measured(tmp_path):
    tensor = torch.ones(1)
    torch.save({"a" * (MOST_NAME + 1): tensor}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", f"{MOST_NAME} is the most")
    torch.save({f"{number}.w": tensor for number in range(MOST_TENSORS + 1)}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "is the most|far more")


def test_a_network_that_is_there_many_times_is_looked_into_once_or_not_at_all(tmp_path):
    many = nn.ModuleDict({str(number): nn.Identity() for number in range(500)})
    torch.save({f"net{number}": many for number in range(300)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "no state dict|not put together")
