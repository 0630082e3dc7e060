"""Images of every kind: what is odd, broken or larger than it looks is refused in a line, before memory is taken for it."""

import io
import os
import socket
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from backdoor_gym.data.arrays import as_images, as_labels
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.data.own_images import own_images
from backdoor_gym.errors import DataError
from backdoor_gym.files.npz import Member, members

PIXELS, LABELS = torch.rand(20, 1, 8, 8), torch.arange(20) % 10


def odd_images():
    return {
        "meta": PIXELS.to("meta"),
        "sparse": PIXELS.to_sparse(),
        "csr": torch.eye(8).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(PIXELS, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.rand(1, 8, 8)] * 20),
        "complex": PIXELS.to(torch.complex64),
        "bool": PIXELS > 0.5,
        "expanded": torch.zeros(1, 1, 1, 1).expand(10**6, 3, 1000, 1000),
        "broadcast": np.broadcast_to(np.zeros((1, 1, 1, 1), np.float32), (10**6, 1, 1000, 1000)),
        "strided": np.lib.stride_tricks.as_strided(np.zeros(4, np.uint8), (10**6, 1000, 1000, 3), (0, 0, 0, 1)),
        "masked": np.ma.masked_array(PIXELS.numpy(), PIXELS.numpy() > 0.5),
        "objects": np.array([[[[None]]]] * 20),
        "records": np.zeros((20, 1, 8, 8), dtype=[("a", "u1")]),
        "dates": np.zeros((20, 1, 8, 8), dtype="M8[s]"),
        "no height": torch.zeros(20, 1, 0, 8),
        "no channel": torch.zeros(20, 0, 8, 8),
        "no image": torch.zeros(0, 1, 8, 8),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", odd_images())
def test_odd_images_are_refused(kind):
    images = odd_images()[kind]
    with pytest.raises(DataError):
        own_images((images, LABELS))
    with pytest.raises(DataError):
        LabelledImages(images, LABELS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "labels",
    [
        LABELS.to("meta"), LABELS.to_sparse(), torch.nested.nested_tensor([torch.rand(1)] * 20), LABELS.to(torch.complex64),
        torch.zeros(1, dtype=torch.int64).expand(10**12), np.broadcast_to(np.zeros(1, np.int64), (10**12,)),
        torch.zeros(1, 1).expand(10**6, 10**6), np.array([None] * 20), [10**30] * 20, [[1], [1, 2]], {1: 2}, "abc", None,
        np.ma.masked_array(LABELS.numpy()), (number for number in range(20)),
    ],
    ids=lambda labels: type(labels).__name__,
)  # fmt: skip
def test_odd_labels_are_refused(labels):
    with pytest.raises(DataError):
        as_labels(labels)
    with pytest.raises(DataError):
        own_images((PIXELS, labels))


def test_views_of_bearable_size_are_taken():
    assert as_images(torch.zeros(1, 1, 1, 1).expand(100, 3, 8, 8)).shape == (100, 3, 8, 8)
    assert torch.equal(as_images(PIXELS.numpy()[:, :, ::-1]), PIXELS.flip(2))
    assert torch.equal(as_images(PIXELS.numpy().astype(">f4")), PIXELS)


@pytest.mark.parametrize(
    "size", [5, "8x8", (1,), (0, 8), (-1, 8), (2.5, 8), ("a", "b"), (True, 8), (8, 8, 8), (8, float("nan"))]
)
def test_sizes_are_two_numbers_of_pixels(size):
    with pytest.raises(DataError, match=r"size of images|resized to"):
        own_images((PIXELS, LABELS), size=size)


@pytest.mark.parametrize("side", [1025, 10**6, 10**9, 10**12])
def test_large_sizes_are_refused_before_memory_is_taken(side, tmp_path):
    for size in ((side, side), (8, side), (side, 8)):
        with pytest.raises(DataError, match="1024 pixels a side at most"):
            own_images(folder(tmp_path / str(size)), size=size)


@pytest.mark.parametrize("count", ["5", 2.5, [1]])
def test_counts_are_whole(count):
    with pytest.raises(DataError, match="the number of clean images"):
        own_images((PIXELS, LABELS), count)


def npy(shape, dtype="|u1", fortran=False, data=b"", version=1, header=None):
    text = header or repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + data


GOOD = npy((20, 1, 8, 8), data=bytes(1280))


def npz(path, images, labels=None, kind=zipfile.ZIP_STORED, names=("images.npy", "labels.npy")):
    if labels is None:
        labels = npy((20,), "<i8", data=LABELS.numpy().tobytes())
    with zipfile.ZipFile(path / "a.npz", "w", kind) as archive:
        archive.writestr(names[0], images)
        archive.writestr(names[1], labels)
    return path / "a.npz"


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (npy((10**12, 1, 8, 8)), "not as large as its header says"),
        (npy((10**100,)), "not as large as its header says"),
        (npy((-20, 1, 8, 8), data=bytes(1280)), "no shape"),
        (npy((True, 1, 8, 8), data=bytes(64)), "no shape"),
        (GOOD[:-5], "not as large as its header says"),
        (GOOD + b"more", "not as large as its header says"),
        (npy((20,), "|O", data=b"cos\nsystem\n(S'id'\ntR."), "without pickled objects"),
        (npy((20,), [("a", "<f8")], data=bytes(160)), "must be numbers"),
        (npy((20,), "<U10", data=bytes(800)), "must be numbers"),
        (npy((10**18,), "|V0"), "must be numbers"),
        (npy((20, 1, 8, 8), "<c8", data=bytes(8 * 1280)), "uint8, or float"),
        (npy((20, 1, 8, 8), data=bytes(1280), version=9), "cannot be read|format 9"),
        (npy(0, header=b"(" * 60_000), "cannot be read"),
        (npy((20, 0, 8, 8)), "must have pixels"),
        (npy((), data=b"x"), "one for each image"),
        (npy((19, 1, 8, 8), data=bytes(64 * 19)), "one for each image"),
        (b"", "cannot be read"),
        (b"x" * 100, "cannot be read"),
    ],
)
def test_arrays_are_what_their_headers_say(images, words, tmp_path):
    path = npz(tmp_path, images)
    for count in (5, None):
        with pytest.raises(DataError, match=words) as told:
            own_images(path, count)
        assert str(told.value).isprintable()


def test_packed_arrays_are_no_larger_than_bearable(tmp_path):
    wide = npy((2000, 1, 250, 250), data=bytes(2000 * 250 * 250))
    labels = npy((2000,), "<i8", data=bytes(16000))
    with pytest.raises(DataError, match="unpacks to"):
        own_images(npz(tmp_path, wide, labels, zipfile.ZIP_DEFLATED), 10)
    with pytest.raises(DataError, match="numpy does not use"):
        own_images(npz(tmp_path, GOOD, kind=zipfile.ZIP_LZMA), 10)
    assert len(own_images(npz(tmp_path, GOOD, kind=zipfile.ZIP_DEFLATED), 10).images) == 10


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("\x1b[31mimages.npy", "labels.npy"), ("../images.npy", "labels.npy")]
)
def test_names_of_arrays_are_what_they_are(names, tmp_path):
    with pytest.raises(DataError, match="must hold the arrays images and labels") as told:
        own_images(npz(tmp_path, GOOD, names=names))
    assert str(told.value).isprintable()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_only_what_is_drawn_of_an_npz_is_held(order, save, tmp_path, monkeypatch):
    monkeypatch.setattr("backdoor_gym.files.npz.AT_ONCE", 1000)
    images = np.random.default_rng(0).integers(0, 255, (500, 5, 7, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", images=np.asarray(images, order=order), labels=np.arange(500) % 10)
    found = own_images(tmp_path / "a.npz", 50).images
    expected = own_images((images, np.arange(500) % 10), 50).images
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)
    member: Member = members(tmp_path / "a.npz", ("images",))[0]
    assert member.read([3, 499]).shape == (2, 5, 7, 3)
    assert np.array_equal(member.read(), images)


def folder(path, name="a.png"):
    (path / "0").mkdir(parents=True)
    Image.new("L", (8, 8)).save(path / "0" / name)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, more=b"", depth=8, packed=None):
    packed = zlib.compress(bytes((width * depth // 8 + 1) * height)) if packed is None else packed
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def saved(kind, mode="L", frames=1):
    with io.BytesIO() as file:
        more = {"save_all": True, "append_images": [Image.new(mode, (8, 8), 99)]} if frames > 1 else {}
        Image.new(mode, (8, 8)).save(file, kind, **more)
        return file.getvalue()


LARGE_TEXT = zlib.compress(bytes(10**8))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b""), ("a.png", png(8, 8)[:40]), ("a.png", png(8, 8)[:-20] + b"x" * 20), ("a.png", png(0, 0)),
        ("a.png", png(8, 8, chunk(b"zTXt", b"k\0\0" + LARGE_TEXT))),
        ("a.png", png(8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + LARGE_TEXT))),
        ("a.png", png(8, 8, depth=16)), ("a.png", png(9000, 9000, packed=b"")), ("a.png", png(50000, 50000, packed=b"")),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"),
        ("a.tif", saved("TIFF")[:50]), ("a.tif", b"II*\0\xff\xff\xff\xff"), ("a.tif", saved("TIFF", "F")),
        ("a.gif", saved("GIF")[:20]), ("a.gif", b"GIF89a\xff\xff\xff\xff\0\0\0" + saved("GIF")[13:]),
        ("a.webp", saved("WEBP")[:30]),
        ("a.jpg", saved("JPEG")[:200]), ("a.bmp", saved("BMP")[:40]), ("a.ppm", b"P6\n8 \xf3 255\n" + bytes(192)),
        ("a.ppm", b"P6\n99999999999 99999999999 255\n"), ("a.ppm", b"P3 8 8 255\n" + b"1" * 10**6),
        *((f"a.{kind.lower()}", saved(kind, frames=2)) for kind in ("GIF", "PNG", "WEBP", "TIFF")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, (8, 8)])
def test_broken_and_odd_files_are_refused(name, content, size, tmp_path):
    (folder(tmp_path, "b.png") / "0" / name).write_bytes(content)
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot be read as an image") as told:
        own_images(tmp_path, size=size)
    assert time.monotonic() - start < 5
    assert str(told.value).isprintable()


def test_images_that_are_not_resized_have_a_bearable_size(tmp_path):
    (folder(tmp_path) / "0" / "a.png").write_bytes(png(1500, 8))
    with pytest.raises(DataError, match="1024 a side"):
        own_images(tmp_path)
    assert own_images(tmp_path, size=(8, 8)).images.images.shape == (1, 1, 8, 8)


def test_more_images_than_memory_are_refused_after_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("backdoor_gym.data.folders.MOST_HELD", 1000)
    for index in range(10):
        Image.new("L", (8, 8)).save(folder(tmp_path / str(index)) / "0" / "b.png")
        os.replace(tmp_path / str(index) / "0" / "b.png", tmp_path / str(index) / "b.png")
    with pytest.raises(DataError, match="draw fewer"):
        own_images(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    inside = folder(tmp_path) / "0"
    os.mkfifo(inside / "fifo.png")
    os.symlink("/dev/zero", inside / "device.png")
    os.symlink("nowhere", inside / "dangling.png")
    os.symlink("loop.png", inside / "loop.png")
    (inside / "folder.png").mkdir()
    monkeypatch.chdir(inside)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        assert len(own_images(tmp_path).images) == 1
    for source in (inside / "fifo.png", str(inside / "fifo.png"), "/dev/zero"):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            own_images(source)
    os.mkfifo(tmp_path / "fifo.npz")
    with pytest.raises(DataError, match="no such file"):
        own_images(tmp_path / "fifo.npz")


def test_names_of_classes_and_files_are_shown_as_what_they_are(tmp_path):
    os.rename(folder(tmp_path) / "0", tmp_path / ("9" * 200))
    assert own_images(tmp_path).images.labels.tolist() == [0]
    os.rename(tmp_path / ("9" * 200), tmp_path / "\x1b[31m\u202e")
    (tmp_path / "\x1b[31m\u202e" / "b\n.png").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as an image") as told:
        own_images(tmp_path)
    assert str(told.value).isprintable()


@pytest.mark.slow
def test_many_files_are_listed_in_time(tmp_path):
    folder(tmp_path)
    (tmp_path / "1").mkdir()
    for index in range(20_000):
        os.symlink("../0/a.png", tmp_path / "1" / f"{index}.png")
    start = time.monotonic()
    assert len(own_images(tmp_path, 10).images) == 10
    assert time.monotonic() - start < 10


class Lengthy:
    """A data set of items that says anything of how many there are."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.zeros(3, 4, 4), 0


@pytest.mark.parametrize("length", [10**12, -3, "many", 2.5])
def test_data_sets_that_say_odd_things_of_their_length(length):
    with pytest.raises(DataError, match=r"Lengthy (says that it has|does not tell how many items)"):
        own_images(Lengthy(length), 10)
