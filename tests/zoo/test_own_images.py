import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from backdoor_gym.errors import DataError
from backdoor_gym.zoo.own_images import all_images, own_images

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
        ({"images": IMAGES.numpy(), "labels": LABELS.numpy()}, "1 or 3 channels"),
        ({"images": IMAGES.numpy().astype(np.int64), "labels": LABELS.numpy()}, "uint8 .* or float"),
        ({"images": FLOATS.numpy() * 255, "labels": LABELS.numpy()}, r"must lie in \[0, 1\]"),
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
        ("no/such/set", "cannot read the data set"),
        ("absent.npz", "cannot be read"),
        ([(FLOATS[0], 1.5)], "must be an integer"),
        ([FLOATS[0]], "must begin with images and labels"),
        ([(FLOATS[0, 0], 1)], r"must be a tensor \(C, H, W\)"),
        ([(FLOATS[0], 1), (FLOATS[0, :, :2], 1), (FLOATS[0], 1)], "different shapes"),
        ([(IMAGES[0], 1), (IMAGES[0], 1), (IMAGES[0], 1)], "float32"),
        (TensorDataset(FLOATS[:0], LABELS[:0]), "no image"),
    ],
)
def test_what_holds_no_images_is_refused(source, words):
    with pytest.raises(DataError, match=words):
        own_images(source)
