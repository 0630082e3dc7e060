import numpy as np
import pytest
import torch

from backdoor_gym.data import datasets, hub
from backdoor_gym.data.datasets import DataSource, LabelledImages, load_images
from backdoor_gym.errors import DataError, UnknownNameError
from backdoor_gym.models.infecting import divide, infect
from backdoor_gym.models.training import Schedule

library = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set in the Hub's layout: colour images of 12 x 10 pixels, three classes."""
    root = tmp_path_factory.mktemp("hub") / "tiny"
    root.mkdir()
    random = np.random.default_rng(0)
    features = library.Features({"img": library.Image(), "label": library.ClassLabel(names=["a", "b", "c"])})
    for split, count in (("train", 60), ("test", 30)):
        rows = {
            "img": [random.integers(0, 256, (12, 10, 3), dtype=np.uint8) for _ in range(count)],
            "label": [int(label) for label in random.integers(0, 3, count)],
        }
        library.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def test_digits_are_float_images_between_zero_and_one():
    images, labels = load_images("digits", "all")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.max() == 1
    assert labels.dtype == torch.int64
    assert torch.equal(load_images("digits", "all", [5, 3])[0], images[[5, 3]])


def test_a_folder_in_the_layout_of_the_hub(folder):
    images, labels = load_images(str(folder), "train")
    assert images.shape == (60, 3, 12, 10)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(load_images(str(folder), "train", [7])[0][0], images[7])
    assert datasets.num_classes(str(folder), "train") == 3
    assert datasets.splits(str(folder)) == ("train", "test")
    assert datasets.image_shape(str(folder), "test") == (3, 12, 10)
    assert set(labels.tolist()) == {0, 1, 2}


def test_a_local_copy_stands_in_for_a_hub_id(folder, monkeypatch):
    monkeypatch.setenv(hub.DATA_VARIABLE, str(folder.parent))
    assert datasets.split_size("somebody/tiny", "test") == 30


def test_a_model_of_another_data_set_and_image_size(folder, tmp_path):
    model = infect(
        str(folder),
        "small_cnn",
        "blended",
        target=2,
        schedule=Schedule(epochs=1, batch_size=16),
        architecture_options={"width": 6, "blocks": 2},
        clean_images=20,
    )
    assert model.num_classes == 3
    path = model.save(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="--data"):  # a folder that a file names is not opened
        type(model).load(path)
    again = type(model).load(path, data=str(folder))
    assert torch.equal(again.clean.images, model.clean.images)
    assert again.test.source.split == "test"


def test_the_parts_of_a_division_do_not_overlap(folder):
    generator = torch.Generator().manual_seed(0)
    training, clean, test = divide(str(folder), "train", "test", 20, generator)
    assert not set(training.source.indices) & set(clean.source.indices)
    assert (len(training), len(clean), len(test)) == (40, 20, 30)
    parts = [set(part.source.indices) for part in divide("digits", "all", "all", 100, generator)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 1797
    with pytest.raises(DataError, match="number of clean images"):
        divide(str(folder), "train", "test", 60, generator)


def test_another_copy_of_the_data_is_noticed(folder, tmp_path, infected):
    path = infected.save(tmp_path / "model.safetensors")
    with pytest.raises((DataError, UnknownNameError), match="split"):
        type(infected).load(path, data=str(folder))


def test_what_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="nowhere"):
        load_images("./nowhere", "train")
    with pytest.raises(UnknownNameError, match="'train'"):
        load_images(str(folder), "trian")
    with pytest.raises(DataError, match="30 images"):
        load_images(str(folder), "test", [30])


def save(root, images, labels, features):
    root.mkdir()
    for split in ("train", "test"):
        rows = {"image": images, "label": labels}
        library.Dataset.from_dict(rows, features=library.Features({"image": library.Image(), **features})).to_parquet(
            root / f"{split}-00000-of-00001.parquet"
        )
    return str(root)


@pytest.mark.parametrize(
    ("shapes", "labels", "feature", "words"),
    [
        ([(8, 8, 3), (8, 9, 3)], [0, 1], library.Value("int64"), "different sizes"),
        ([(8, 8, 3), (8, 8, 3)], ["cat", "dog"], library.Value("string"), "class numbers"),
        ([(8, 8, 3), (8, 8, 3)], [0, -1], library.Value("int64"), "class numbers"),
    ],
)
def test_data_sets_that_do_not_fit_are_refused(tmp_path, shapes, labels, feature, words):
    images = [np.zeros(shape, dtype=np.uint8) for shape in shapes]
    with pytest.raises(DataError, match=words):
        load_images(save(tmp_path / "set", images, labels, {"label": feature}), "train")


def hub_copy(root, files, features, rows):
    """A local copy of a Hub data set: files by split, features, and a function from the row's number to its values."""
    for split, (path, count) in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        made = [rows(number, split) for number in range(count)]
        columns = {key: [row[key] for row in made] for key in features}
        library.Dataset.from_dict(columns, features=library.Features(features)).to_parquet(root / path)
    return root


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Small data sets in the layout of those of the Hub, under the names under which they are looked for."""
    root = tmp_path_factory.mktemp("copies")
    fine, coarse = (library.ClassLabel(names=[f"{kind}{i}" for i in range(n)]) for kind, n in (("f", 100), ("c", 20)))
    hub_copy(
        root / "cifar100",
        {split: (f"cifar100/{split}-00000-of-00001.parquet", 100) for split in ("train", "test")},
        {"img": library.Image(), "fine_label": fine, "coarse_label": coarse},
        lambda number, _: {"img": pixels(32, 32, 3), "fine_label": number, "coarse_label": number // 5},
    )
    digit = library.ClassLabel(names=[str(i) for i in range(10)])
    for name in ("mnist", "fashion_mnist"):
        hub_copy(
            root / name,
            {split: (f"{name}/{split}-00000-of-00001.parquet", 40) for split in ("train", "test")},
            {"image": library.Image(), "label": digit},
            lambda number, _: {"image": pixels(28, 28), "label": number % 10},
        )
    wnid = library.ClassLabel(names=[f"n{i:08d}" for i in range(200)])
    hub_copy(  # some of its images are grey, one of them the first of the test images here
        root / "tiny-imagenet",
        {split: (f"data/{split}-00000-of-00001.parquet", 30) for split in ("train", "valid")},
        {"image": library.Image(), "label": wnid},
        lambda number, split: {
            "image": pixels(64, 64) if (number == 0) == (split == "valid") else pixels(64, 64, 3),
            "label": number,
        },
    )
    sign = library.ClassLabel(names=[f"sign {i}" for i in range(43)])
    hub_copy(  # images of all sizes, and splits beside train and test
        root / "gtsrb",
        {split: (f"data/{split}-00000-of-00001.parquet", 43) for split in ("contrast", "test", "train")},
        {"image": library.Image(), "label": sign},
        lambda number, _: {"image": pixels(20 + number, 25 + number % 7, 3), "label": number},
    )
    return root


@pytest.mark.parametrize(
    ("dataset", "test_split", "shape", "classes"),
    [
        ("uoft-cs/cifar100?label=fine_label", "test", (3, 32, 32), 100),
        ("uoft-cs/cifar100?label=coarse_label", "test", (3, 32, 32), 20),
        ("ylecun/mnist", "test", (1, 28, 28), 10),
        ("zalando-datasets/fashion_mnist?size=32&channels=3", "test", (3, 32, 32), 10),
        ("zh-plus/tiny-imagenet?channels=3", "valid", (3, 64, 64), 200),
        ("tanganke/gtsrb?size=32", "test", (3, 32, 32), 43),
        ("tanganke/gtsrb?size=24x40", "test", (3, 24, 40), 43),
    ],
)
def test_data_sets_of_the_hub(copies, monkeypatch, dataset, test_split, shape, classes):
    monkeypatch.setenv(hub.DATA_VARIABLE, str(copies))
    assert datasets.splits(dataset) == ("train", test_split)
    assert datasets.num_classes(dataset, "train") == classes
    for split in ("train", test_split):
        assert datasets.image_shape(dataset, split) == shape
        images, labels = load_images(dataset, split, range(5, 25))
        assert images.shape == (20, *shape)
        assert int(labels.max()) < classes


def test_images_are_resized_smoothly(copies, monkeypatch):
    monkeypatch.setenv(hub.DATA_VARIABLE, str(copies))
    (whole,), _ = load_images("zh-plus/tiny-imagenet?channels=3", "train", [3])
    (small,), _ = load_images("zh-plus/tiny-imagenet?channels=3&size=16", "train", [3])
    # Of noise a smoothed image keeps little; picking pixels would keep it all.
    assert small.std() < 0.4 * whole.std()
    assert small.mean() == pytest.approx(whole.mean().item(), abs=0.01)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("uoft-cs/cifar100", "several label columns .fine_label, coarse_label.*label=fine_label"),
        ("uoft-cs/cifar100?label=fine", "did you mean 'fine_label'"),
        ("tanganke/gtsrb", "different sizes.*gtsrb.size=32"),
        ("tanganke/gtsrb?sise=32", "did you mean 'size'"),
        ("tanganke/gtsrb?size=0", "HEIGHTxWIDTH"),
        ("tanganke/gtsrb?size=32x32x3", "HEIGHTxWIDTH"),
        ("tanganke/gtsrb?size=32x1025", "1 to 1024 pixels"),
        (f"tanganke/gtsrb?size={'9' * 5000}", "1 to 1024 pixels"),
        ("tanganke/gtsrb?size=32&channels=2", "1 or 3"),
        ("digits?size=4", "no options"),
    ],
)
def test_a_way_of_reading_that_does_not_fit_is_named(copies, monkeypatch, dataset, words):
    monkeypatch.setenv(hub.DATA_VARIABLE, str(copies))
    with pytest.raises((DataError, UnknownNameError), match=words):
        load_images(dataset, "train")


def test_how_images_are_read_is_kept_with_a_model(copies, monkeypatch, tmp_path):
    monkeypatch.setenv(hub.DATA_VARIABLE, str(copies))
    model = infect(
        "tanganke/gtsrb?size=12x16&channels=1",
        "small_cnn",
        "badnets",
        target=40,
        schedule=Schedule(epochs=1, batch_size=16, flip=False),
        architecture_options={"width": 6, "blocks": 2},
        clean_images=10,
    )
    again = type(model).load(model.save(tmp_path / "model.safetensors"))
    assert again.num_classes == 43
    assert again.test.images.shape == (43, 1, 12, 16)
    assert torch.equal(again.clean.images, model.clean.images)


def test_images_of_more_than_eight_bits_are_refused(tmp_path):
    images = [np.zeros((8, 8), dtype=np.uint16)] * 2
    with pytest.raises(DataError, match="8 bits"):
        load_images(save(tmp_path / "set", images, [0, 1], {"label": library.Value("int64")}), "train")


def test_grey_and_colour_images_get_the_mode_of_the_first(tmp_path):
    images = [np.zeros((8, 8), dtype=np.uint8), np.full((8, 8, 3), 255, dtype=np.uint8)]
    loaded, _ = load_images(save(tmp_path / "set", images, [0, 1], {"label": library.Value("int64")}), "train")
    assert loaded.shape == (2, 1, 8, 8)
    assert loaded[1].min() == 1


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(4, 8, 8), torch.zeros(4).long(), "shape"),
        (torch.rand(0, 1, 8, 8), torch.zeros(0).long(), "no image"),
        (torch.rand(4, 1, 8, 8).double(), torch.zeros(4).long(), "float32"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), "float32"),
        (torch.rand(4, 1, 8, 8) * 255, torch.zeros(4).long(), r"\[0, 1\]"),
        (torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long(), r"\[0, 1\]; 4 of 4 hold values that are NaN"),
        (torch.rand(4, 1, 8, 8), torch.zeros(4), "int64"),
        (torch.rand(4, 1, 8, 8), torch.zeros(3).long(), r"\(4,\)"),
        (np.zeros((4, 1, 8, 8)), torch.zeros(4).long(), "tensors"),
    ],
)
def test_unusable_images_are_refused(images, labels, words):
    with pytest.raises(DataError, match=words):
        LabelledImages(images, labels)


def test_the_first_images_are_not_read_before_they_are_needed():
    lazy = LabelledImages.from_source(DataSource("./nowhere", "train", tuple(range(10))))
    assert len(lazy.first(3)) == 3
    assert lazy.first(None) is lazy
    with pytest.raises(DataError):
        lazy.first(3).images  # noqa: B018


@pytest.mark.parametrize(
    "read", [(torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2).long()), (torch.zeros(2, 1, 8, 8), torch.zeros(2))]
)
def test_images_of_a_named_data_set_are_never_handed_out_unchecked(read, monkeypatch):
    monkeypatch.setattr(datasets, "load_images", lambda *_: read)
    lazy = LabelledImages.from_source(DataSource("owner/name", "train", (0, 1)))
    for part in (lazy, lazy.first(1), lazy):  # what is refused is refused again
        for what in ("images", "labels"):
            with pytest.raises(DataError):
                getattr(part, what)
        assert not part.loaded
