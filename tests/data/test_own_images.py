import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from backdoor_gym.data import hub
from backdoor_gym.data.own_images import all_images, own_images
from backdoor_gym.errors import DataError

IMAGES = torch.arange(10 * 3 * 4 * 5).reshape(10, 3, 4, 5).remainder(256).to(torch.uint8)
LABELS = torch.arange(10) % 3
FLOATS = IMAGES.float() / 255


class Pictures(Dataset):
    """What torchvision's data sets give without a transform."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index >= 10:
            raise AssertionError("it knows its length")
        return Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy()), int(LABELS[index])


def write_folder(folder, names, mode="RGB"):
    for index, label in enumerate(LABELS.tolist()):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy()).convert(mode).save(place / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "source",
    [
        (FLOATS, LABELS),
        TensorDataset(FLOATS, LABELS),
        Pictures(),
        DataLoader(TensorDataset(FLOATS, LABELS, LABELS), batch_size=3),
        DataLoader(TensorDataset(FLOATS, LABELS.int()), batch_size=4),
    ],
)
def test_tensors_data_sets_and_loaders_hold_the_same_images(source):
    found = own_images(source).images
    assert torch.equal(found.images, FLOATS)
    assert torch.equal(found.labels, LABELS)


@pytest.mark.parametrize(
    "images",
    [IMAGES.permute(0, 2, 3, 1).numpy(), FLOATS.numpy(), FLOATS.double().numpy()],
    ids=["uint8 NHWC", "float32 NCHW", "float64 NCHW"],
)
def test_npz(images, tmp_path):
    np.savez(tmp_path / "a.npz", images=images, labels=LABELS.numpy().astype(np.int16))
    found = own_images(tmp_path / "a.npz").images
    assert torch.allclose(found.images, FLOATS)
    assert torch.equal(found.labels, LABELS)


def test_grey_npz_needs_no_channel(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES[:, 0].numpy(), labels=LABELS.numpy())
    assert torch.equal(own_images(str(tmp_path / "a.npz")).images.images, FLOATS[:, :1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros(3)}, "must hold the arrays images and labels"),
        ({"images": np.zeros((10, 4, 5, 4), dtype=np.uint8), "labels": LABELS.numpy()}, "1 or 3 channels"),
        ({"images": IMAGES.numpy().astype(np.int64), "labels": LABELS.numpy()}, "uint8, or float.*divide by 255"),
        ({"images": FLOATS.numpy() * 255, "labels": LABELS.numpy()}, r"must lie in \[0, 1\].*divide by 255"),
        ({"images": FLOATS.numpy(), "labels": LABELS.float().numpy()}, "labels must be integers"),
        ({"images": FLOATS.numpy(), "labels": LABELS.numpy()[:4]}, "labels must be"),
        ({"images": np.array([{}], dtype=object), "labels": LABELS.numpy()}, "without pickled objects"),
    ],
)
def test_other_arrays_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=words):
        own_images(tmp_path / "a.npz")


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES.numpy(), labels=LABELS.numpy())
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        own_images(tmp_path / "a.npz")


def test_a_folder_has_a_subfolder_a_class_in_the_order_of_the_names(tmp_path):
    found = own_images(write_folder(tmp_path, ["ant", "bee", "cat"]))
    (tmp_path / "readme.txt").write_text("no class")
    order = sorted(range(10), key=lambda index: (LABELS[index], str(index)))
    assert torch.equal(found.images.labels, LABELS[order])
    assert torch.equal(found.images.images, FLOATS[order])
    assert found.classes == 3
    (tmp_path / "ape").mkdir()
    assert own_images(tmp_path).images.labels.tolist() == [0] * 4 + [2] * 3 + [3] * 3
    assert own_images(tmp_path).classes == 4


def test_folders_named_by_numbers_are_the_labels(tmp_path):
    found = own_images(write_folder(tmp_path, ["10", "2", "7"]))
    assert sorted(set(found.images.labels.tolist())) == [2, 7, 10]
    assert found.classes is None


def test_grey_folders_and_sizes(tmp_path):
    write_folder(tmp_path, ["a", "b", "c"], mode="L")
    assert own_images(tmp_path).images.images.shape == (10, 1, 4, 5)
    assert own_images(tmp_path, size=(8, 6)).images.images.shape == (10, 1, 8, 6)
    assert all_images(tmp_path, size=(2, 2)).images.shape == (10, 1, 2, 2)
    Image.new("RGB", (7, 3)).save(tmp_path / "a" / "odd.png")
    with pytest.raises(DataError, match=r"different sizes .*5x4 and 7x3.*--image-size"):
        own_images(tmp_path)
    assert own_images(tmp_path, size=(4, 5)).images.images.shape == (11, 3, 4, 5)
    (tmp_path / "b" / "broken.png").write_text("no picture")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        own_images(tmp_path)


def test_some_are_drawn_and_always_the_same(tmp_path):
    one, two = (own_images((FLOATS, LABELS), count=4).images for _ in range(2))
    assert len(one) == 4
    assert torch.equal(one.images, two.images)
    assert len(own_images((FLOATS, LABELS), count=99).images) == 10


def test_named_data_sets_are_divided_into_clean_images_and_the_rest():
    found = own_images("digits")
    assert (len(found.images), len(found.rest), found.classes) == (500, 1297, 10)
    assert not set(found.images.source.indices) & set(found.rest.source.indices)
    assert len(own_images("digits", count=20).images) == 20
    assert len(all_images("digits")) == 1797
    with pytest.raises(DataError, match="1 to 1796"):
        own_images("digits", count=1797)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, "a pair of tensors, a Dataset"),
        ("no/such/set", "no file or folder no/such/set"),
        ("absent.npz", "cannot be read"),
        ([(FLOATS[0], 1.5)], "labels must be integers"),
        ([(FLOATS[0], "cat")], "labels must be integers"),
        ([FLOATS[0]], "must begin with images and labels"),
        ([(FLOATS[0, 0, 0], 1)], r"must be \(n, C, H, W\)"),
        ([("cat.png", 1)], "a tensor or an array, not str"),
        ((FLOATS, torch.rand(10, 3)), "one-hot"),
        ((FLOATS.numpy(), ["cat"] * 10), "labels must be integers"),
        ((FLOATS, LABELS == 1), "labels must be integers"),
        ((FLOATS, LABELS[:9]), "labels must be int64 of shape"),
        ((FLOATS - 0.5, LABELS), r"--mean and --std"),
        ((FLOATS * 255, LABELS), r"span .*: divide by 255$"),
        ((FLOATS.where(FLOATS < 0.9, torch.nan), LABELS), r"\d of 10 hold values that are NaN"),
        ((FLOATS.where(FLOATS < 0.9, torch.inf), LABELS), r"\d of 10 hold values that are infinite"),
        ([(FLOATS[0], 1), (FLOATS[0, :, :2], 1), (FLOATS[0], 1)], "different shapes"),
        ([(IMAGES[0].long(), 1)], "uint8, or float"),
        (TensorDataset(FLOATS[:0], LABELS[:0]), "no image"),
    ],
)
def test_what_holds_no_images_is_refused(source, words):
    with pytest.raises(DataError, match=words):
        own_images(source)


ONE_HOT = nn.functional.one_hot(LABELS)


@pytest.mark.parametrize(
    "source",
    [
        (IMAGES, LABELS),
        (IMAGES.numpy(), LABELS.numpy().astype(np.int32)),
        (IMAGES.permute(0, 2, 3, 1), LABELS[:, None]),
        (FLOATS.permute(0, 2, 3, 1).numpy().astype(">f8"), ONE_HOT.numpy()),
        (FLOATS.double(), ONE_HOT.float()),
        [FLOATS.numpy(), LABELS.tolist()],
        [(image.numpy(), label) for image, label in zip(IMAGES, LABELS.numpy(), strict=True)],
        [(image.permute(1, 2, 0), rows) for image, rows in zip(FLOATS, ONE_HOT, strict=True)],
        DataLoader(TensorDataset(IMAGES, ONE_HOT), batch_size=3),
    ],
)
def test_other_forms_are_taken_where_there_is_no_doubt(source):
    for found in (own_images(source).images, all_images(source)):
        assert torch.allclose(found.images, FLOATS)
        assert found.images.dtype == torch.float32
        assert torch.equal(found.labels, LABELS)


def test_grey_arrays_need_no_channel_and_signals_stay_as_they_are():
    assert torch.equal(own_images((FLOATS[:, 0], LABELS)).images.images, FLOATS[:, :1])
    assert torch.equal(own_images([(FLOATS[0, 0].numpy(), 1)]).images.images, FLOATS[:1, :1])
    signals = torch.rand(10, 9, 40, 1)
    assert own_images((signals, LABELS)).images.images.shape == signals.shape
    assert own_images((torch.rand(10, 28, 28, 1), LABELS)).images.images.shape == (10, 1, 28, 28)


def test_what_rounding_did_is_no_reason_to_refuse():
    assert own_images((FLOATS * (1 + 1e-7) - 1e-8, LABELS)).images.images.max() == 1


def test_a_list_of_two_items_is_no_pair():
    found = own_images([(FLOATS[0], 1), (FLOATS[1], 2)]).images
    assert found.labels.tolist() == [1, 2]


class Recorder(Dataset):
    """Tells which items were asked for."""

    def __init__(self, count=300, classes=10, **known):
        self.count, self.classes, self.asked = count, classes, []
        for name, value in known.items():
            setattr(self, name, value)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(int(index))
        return torch.full((1, 2, 2), index / self.count), index % self.classes


def counts(labels):
    return torch.bincount(labels).tolist()


NUMBERS = [index % 10 for index in range(300)]


@pytest.mark.parametrize(
    "known",
    [
        {"targets": NUMBERS},
        {"targets": torch.tensor(NUMBERS)},
        {"labels": np.array(NUMBERS)},
        {"samples": [(f"{index}.png", label) for index, label in enumerate(NUMBERS)]},
        {"tensors": (None, torch.tensor(NUMBERS)), "labels": ["cat", "dog"]},
        {},
    ],
)
def test_only_what_is_drawn_of_a_data_set_is_read(known):
    data = Recorder(**known)
    found = own_images(data, count=20).images
    assert sorted(data.asked) == sorted(set(data.asked))
    assert len(data.asked) == len(found) == 20
    assert torch.equal(found.images[:, 0, 0, 0], torch.tensor(sorted(data.asked)) / 300)
    if known:
        assert counts(found.labels) == [2] * 10
    again = own_images(Recorder(**known), count=20).images
    assert torch.equal(found.images, again.images)


def test_parts_of_a_data_set_and_loaders_are_drawn_alike():
    data = Recorder(targets=NUMBERS)
    part = Subset(data, range(100, 300))
    found = own_images(part, count=30).images
    assert counts(found.labels) == [3] * 10
    assert len(data.asked) == 30
    assert min(data.asked) >= 100
    data.asked.clear()
    loader = DataLoader(data, batch_size=7, sampler=SubsetRandomSampler(range(100, 300)))
    drawn = own_images(loader, count=30).images
    assert len(data.asked) == 30
    assert torch.equal(drawn.images, found.images)
    assert len(own_images(loader).images) == 200


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(FLOATS, LABELS.tolist(), strict=True)


def test_streams_are_read_to_their_end():
    for source in (Stream(), DataLoader(Stream(), batch_size=4)):
        assert torch.equal(own_images(source).images.images, FLOATS)
        assert len(own_images(source, count=4).images) == 4


def write_classes(root, names, each, colour=(0,)):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(each):
            Image.new("L" if len(colour) == 1 else "RGB", (8, 8), *([number] if len(colour) == 1 else [colour])).save(
                root / name / f"{index}.png"
            )
    return root


@pytest.mark.parametrize("each", [1, 20])
def test_of_a_folder_each_class_is_drawn_and_the_rest_not_opened(each, tmp_path, monkeypatch):
    write_classes(tmp_path, [f"{index:02}x" for index in range(30)], each)
    (tmp_path / "00x" / "second.png").write_bytes((tmp_path / "00x" / "0.png").read_bytes())
    opened, plain = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: opened.append(file) or plain(file, *rest))
    found = own_images(tmp_path, count=30)
    assert sorted(found.images.labels.tolist()) == list(range(30))
    assert len(opened) == 30
    assert found.classes == 30


def test_fewer_images_than_classes_are_drawn_and_told(tmp_path):
    write_classes(tmp_path, "abcdef", 3)
    for source in (tmp_path, TensorDataset(torch.rand(18, 1, 4, 4), torch.arange(18) % 6)):
        with pytest.warns(UserWarning, match="4 images are drawn of 6 classes, so that 2 have none"):
            found = own_images(source, count=4).images
        assert len(set(found.labels.tolist())) == 4


def test_rare_classes_give_what_they_have():
    labels = torch.tensor([0] * 90 + [1] * 2 + [2] * 8)
    assert counts(own_images((torch.rand(100, 1, 2, 2), labels), count=20).images.labels) == [10, 2, 8]


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An empty folder to be in, and who was asked for from there."""
    asked = []

    def refuse(*host, **_):
        asked.append(host[0])
        raise socket.gaierror("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv(hub.DATA_VARIABLE, raising=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "clean.pt").write_bytes(b"tensors")
    (tmp_path / "photos" / "clean").write_bytes(b"tensors")
    return asked


@pytest.mark.parametrize("read", [own_images, all_images])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("photos/clean.pt", "no kind of file that images are read from"),
        ("photos/clean", "no kind of file"),
        ("./photos/clean.pt", "no kind of file"),
        ("~/photos/clean.pt", "no kind of file"),
        (Path("photos/clean.pt"), "no kind of file"),
        ("photos/clean?size=32", "is a file"),
        ("photos/misspelt", "no file or folder"),
        ("photo/clean.zip", "no file or folder"),
        ("photos", "one subfolder a class"),
        ("photo", "no file or folder"),
        ("./photo", "no file or folder"),
        ("~/photo", "no file or folder"),
        ("/photo/clean", "no file or folder"),
        ("a/photo/clean", "no file or folder"),
        ("photo/", "no file or folder"),
        ("photo\\clean", "no file or folder"),
        ("C:\\photo\\clean", "no file or folder"),
        ("my photo/clean", "no file or folder"),
        ("hf:owner/name", "no file or folder"),
        ("pandas", "no file or folder"),
        (Path("owner/name"), "no file or folder"),
    ],
)
def test_names_of_local_files_are_sent_nowhere(read, source, words, no_network):
    with pytest.raises(DataError, match=words):
        read(source)
    assert not no_network


@pytest.mark.parametrize("read", [own_images, all_images])
@pytest.mark.parametrize("name", ["owner/name", "owner-1/na.me_v1.2?size=32"])
def test_names_of_the_hub_are(read, name, no_network, monkeypatch):
    asked = []
    library = pytest.importorskip("datasets")
    hub.load.cache_clear()
    monkeypatch.setattr(library, "load_dataset", lambda name: asked.append(name) or {})
    with pytest.raises(DataError, match="splits train and test"):
        read(name)
    assert asked == [name.partition("?")[0]]


def test_archives_are_to_be_unpacked_and_flat_folders_to_be_divided(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(tmp_path / "1.png")
    with tarfile.open(tmp_path / "images", "w:gz") as file:
        file.add(tmp_path / "1.png")
    for name in ("a.zip", "images"):
        with pytest.raises(DataError, match="unpack it first"):
            own_images(tmp_path / name)
    with pytest.raises(DataError, match="of each class into a subfolder"):
        own_images(tmp_path)
