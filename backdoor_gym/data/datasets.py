"""Image data: scikit-learn's digits, and any image-classification data set of the Hub or of a local folder in its layout.

A data set is named by its Hub id (``uoft-cs/cifar10``), by a local folder, or ``digits``. Where the environment
variable ``BACKDOOR_GYM_DATA`` names a folder, a Hub id is looked for there first, under its last part (``cifar10``).

How it is read may follow the name after a question mark, joined by ``&`` (``tanganke/gtsrb?size=32``,
``uoft-cs/cifar100?label=fine_label&size=24x32``). It is part of the name, so that a saved model's images are read alike:

- ``label=COLUMN``: the label column. Needed where there are several, or where it is neither of class labels nor called
  "label" or "labels";
- ``size=SIDE`` or ``size=HEIGHTxWIDTH``: images are resized to it, bilinear and smoothed where they shrink. Needed where
  they differ in size;
- ``channels=1`` or ``channels=3``: grey or colour. Default: as the first image is.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, UnknownNameError
from ..files.plain import check_plain
from ..files.schemas import DatasetName, fits

DIGITS = "digits"
DATA_VARIABLE = "BACKDOOR_GYM_DATA"
#: Modes of PIL that have no colour.
_GREY = ("1", "L", "LA")
#: Pixels a side that a name or a file may ask for.
MOST_SIDE = 1024
#: A name of the Hub; whatever else is no folder is never sent to it.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
#: Ends of names by which a misspelt file is told from a data set of the Hub.
_OF_FILES = re.compile(
    r"\.(7z|arrow|bin|bmp|bz2|ckpt|csv|gif|gz|h5|hdf5|jpe?g|jsonl?|mat|np[yz]|onnx|parquet|pickle|pkl|png|pth?|rar|safetensors|"
    r"t[ag][rz]|tiff?|[ct]sv|txt|webp|xz|zip|zst)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DataSource:
    """Some images of a named data set: what a saved model holds instead of the images."""

    dataset: str
    split: str
    indices: tuple[int, ...]
    #: Digest of the labels of the whole split, to notice another copy or order of the data.
    fingerprint: str = ""


class LabelledImages:
    """Images float32 (n, C, H, W) in [0, 1] with labels int64 (n,), held in memory or named by a ``DataSource``.

    ``classes`` is how many classes the place has that they were read from, None where it does not tell: a network of another
    number means other things by its labels.

    Raises:
        DataError: wrong shape, dtype or range, lengths that differ, or no image at all.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, source: DataSource | None = None, classes: int | None = None
    ) -> None:
        check_images(images, labels)
        self._data: tuple[Tensor, Tensor] | None = (images, labels)
        self.source, self.classes = source, classes

    @classmethod
    def from_source(cls, source: DataSource, classes: int | None = None) -> "LabelledImages":
        """Images that are read when they are first asked for."""
        if not source.indices:
            raise DataError(f"no images are named of {source.dataset}, split {source.split}")
        self = cls.__new__(cls)
        self._data, self.source, self.classes = None, source, classes
        return self

    @property
    def loaded(self) -> bool:
        """Whether the images are in memory."""
        return self._data is not None

    def __len__(self) -> int:
        if self._data is None and self.source is not None:
            return len(self.source.indices)
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """float32 (n, C, H, W) in [0, 1]."""
        return self._loaded()[0]

    @property
    def labels(self) -> Tensor:
        """int64 (n,)."""
        return self._loaded()[1]

    def first(self, count: int | None) -> "LabelledImages":
        """The first ``count`` of them (all where None or fewer)."""
        if count is None or count >= len(self):
            return self
        if self._data is None and self.source is not None:
            source = self.source
            return LabelledImages.from_source(
                DataSource(source.dataset, source.split, source.indices[:count], source.fingerprint)
            )
        return LabelledImages(self.images[:count], self.labels[:count])

    def _loaded(self) -> tuple[Tensor, Tensor]:
        if self._data is None:
            assert self.source is not None
            self._data = load_images(self.source.dataset, self.source.split, self.source.indices)
            check_images(*self._data)
        return self._data


def check_images(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    """Raise ``DataError`` unless images are float32 (n, C, H, W) in [0, 1] with int64 labels (n,), n > 0."""
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DataError(f"images and labels must be tensors, not {type(images).__name__} and {type(labels).__name__}")
    check_plain("images", images)
    check_plain("labels", labels)
    if images.ndim != 4:
        raise DataError(f"images must have the shape (n, C, H, W), not {tuple(images.shape)}")
    if len(images) == 0:
        raise DataError("there is no image; at least one is needed")
    if images.numel() == 0:
        raise DataError(f"the images have no pixels: their shape is {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise DataError(f"images must be float32 in [0, 1], not {images.dtype}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise DataError(f"labels must be int64 of shape ({len(images)},), not {labels.dtype} {tuple(labels.shape)}")
    low, high = images.min().item(), images.max().item()  # of which one is NaN, or infinite, where any value is
    for name, count in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        if not np.isfinite([low, high]).all() and (wrong := int(count(images).flatten(1).any(1).sum())):
            raise DataError(f"images must lie in [0, 1]; {wrong} of {len(images)} hold values that are {name}")
    if low < 0 or high > 1:
        normalised = "give them as they were before, and the normalisation as --mean and --std (Normalise(mean, std))"
        to_255 = "divide by 255"
        what = normalised if low < 0 else to_255 if high > 16 else f"{to_255}, or {normalised}"
        raise DataError(f"images must lie in [0, 1]; they span {low:g} to {high:g}: {what}")
    if num_classes is not None:
        check_labels(labels, num_classes)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ``DataError`` unless every label is one of 0 to ``num_classes`` - 1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels must be 0 to {num_classes - 1}; they span {low} to {high}")


@dataclass(frozen=True)
class _Reading:
    """A name with how it is read."""

    name: str
    label: str | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None


def _reading(dataset: str) -> _Reading:
    """Of a name with options.

    Raises:
        UnknownNameError: no such option.
        DataError: an unusable value.
    """
    name, sign, text = dataset.partition("?")
    if not sign or name == DIGITS:
        if sign:
            raise DataError(f"{DIGITS} has no options, so not {dataset}")
        return _Reading(name)
    found: dict[str, Any] = {}
    for part in text.split("&"):
        option, _, value = part.partition("=")
        if option == "label":
            found[option] = value
        elif option == "size":
            sides = value.split("x")
            if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
                raise DataError(f"size must be SIDE or HEIGHTxWIDTH in pixels, not {value!r}")
            found[option] = (int(sides[0]), int(sides[-1]))
            if max(found[option]) > MOST_SIDE:
                raise DataError(f"size may be {MOST_SIDE} pixels a side at most, not {value}")
        elif option == "channels":
            if value not in ("1", "3"):
                raise DataError(f"channels must be 1 or 3, not {value!r}")
            found[option] = int(value)
        else:
            raise UnknownNameError("option of a data set", option, ("label", "size", "channels"))
    return _Reading(name, **found)


def load_images(dataset: str, split: str, indices: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Images float32 (n, C, H, W) in [0, 1] and labels int64 (n,) of a split; all of it where ``indices`` is None.

    Raises:
        DataError: the data set, the split or an index does not exist, or it holds no labelled images.
    """
    size = split_size(dataset, split)
    if indices is not None and len(indices) and not 0 <= min(indices) <= max(indices) < size:
        raise DataError(f"{dataset}, split {split}, has {size} images; indices reach {max(indices)}")
    if dataset == DIGITS:
        images, labels = _digits()
        chosen = slice(None) if indices is None else torch.as_tensor(indices, dtype=torch.long)
        return images[chosen], labels[chosen]
    rows = _hub_split(dataset, split)
    if indices is not None:
        rows = rows.select(indices)
    image_column, label_column = _columns(dataset, split)
    grey, resized = _is_grey(dataset), _reading(dataset).size
    pixels = _all_pixels(dataset, rows[image_column], grey, resized)
    sizes = sorted({image.shape[:2] for image in pixels})
    if len(sizes) > 1:
        raise DataError(
            f"the images of {dataset} have different sizes ({sizes[0]} and {sizes[-1]}); say to which they are resized, as "
            f"in {_reading(dataset).name}?size=32"
        )
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(255)
    return images, torch.tensor(_integers(dataset, rows[label_column]), dtype=torch.long)


def split_size(dataset: str, split: str) -> int:
    """Number of images of a split."""
    return len(_digits()[1]) if dataset == DIGITS else len(_hub_split(dataset, split))


def image_shape(dataset: str, split: str) -> tuple[int, int, int]:
    """(C, H, W) of the images of a split."""
    channels, height, width = load_images(dataset, split, [0])[0].shape[1:]
    return channels, height, width


def num_classes(dataset: str, split: str) -> int:
    """Number of classes of a split."""
    if dataset == DIGITS:
        return 10
    feature = _hub_split(dataset, split).features[_columns(dataset, split)[1]]
    return getattr(feature, "num_classes", None) or int(max(_labels(dataset, split))) + 1


def fingerprint(dataset: str, split: str) -> str:
    """Digest of the labels of a split, in order."""
    return hashlib.sha256(np.asarray(_labels(dataset, split), dtype=np.int64).tobytes()).hexdigest()[:16]


def splits(dataset: str) -> tuple[str, str]:
    """The names of the split to train on and of the one to test on."""
    if dataset == DIGITS:
        return "all", "all"
    available = list(_hub(dataset))
    test = next((name for name in ("test", "validation", "valid") if name in available), None)
    if "train" not in available or test is None:
        raise DataError(f"{dataset} needs the splits train and test (or validation); it has {', '.join(available)}")
    return "train", test


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().div_(16).unsqueeze(1)
    return images, torch.from_numpy(data.target).long()


def named_in_file(dataset: str) -> str:
    """The name of a data set as a model's file gives it: ``digits`` or a name of the Hub, with reading options.

    What stands in a file may be anybody's word, so it opens no folder of this machine.

    Raises:
        DataError: another name, or one that is also a folder here.
    """
    hint = "say which data set is meant: --data NAME_OR_FOLDER (data=)"
    if not fits(dataset, DatasetName):
        raise DataError(f"the model names the data set {dataset!r}, which is neither {DIGITS} nor OWNER/NAME; {hint}")
    if dataset != DIGITS and os.path.exists(_reading(dataset).name):
        raise DataError(f"the model names the data set {dataset}, and a folder here is called so too; {hint}")
    return dataset


def _location(dataset: str) -> str:
    """Where to read it: a local folder, a local copy of a Hub id, or the name itself where it has the form of a Hub id.

    Raises:
        DataError: none of these: names of local files are nobody else's business.
    """
    folder = os.path.expanduser(dataset)  # what is no path at all is none that exists
    if os.path.isdir(folder):
        return os.path.abspath(folder)  # a bare name may also be that of a builder in the library
    root = os.environ.get(DATA_VARIABLE)
    if root and os.path.isdir(local := os.path.join(root, dataset.rsplit("/", 1)[-1])):
        return os.path.abspath(local)
    if os.path.exists(folder):
        raise DataError(f"{dataset} is a file; a data set is a folder, or OWNER/NAME on the Hub")
    if not _HUB_ID.fullmatch(dataset) or _OF_FILES.search(dataset) or os.path.isdir(os.path.dirname(folder) or "."):
        raise DataError(
            f"there is no file or folder {dataset}, nor one of that name under ${DATA_VARIABLE}; a data set of the Hub is "
            f"named OWNER/NAME, as in uoft-cs/cifar10"
        )
    return dataset


def _hub(dataset: str) -> Any:
    name = _reading(dataset).name
    return _hub_at(_location(name), name)


@lru_cache(maxsize=4)
def _hub_at(location: str, dataset: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"the data set {dataset} needs the extra: pip install 'backdoor-gym[hub]'") from error
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(location)
    except Exception as error:  # the library raises many kinds, each with a long text
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot read the data set {dataset!r} ({reason}); it must be a Hub id, a folder of that name under "
            f"${DATA_VARIABLE}, or a local folder: in the Hub's layout, or with one subfolder a class and the images right in it"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _hub_split(dataset: str, split: str) -> Any:
    available = _hub(dataset)
    if split not in available:
        raise UnknownNameError(f"split of {dataset}", split, available)
    return available[split]


def _columns(dataset: str, split: str) -> tuple[str, str]:
    """The names of the image column and of the label column."""
    import datasets

    features, reading = _hub_split(dataset, split).features, _reading(dataset)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise DataError(f"{dataset} needs an image column; it has {', '.join(features)}")
    if reading.label is not None:
        if reading.label not in features:
            raise UnknownNameError(f"column of {reading.name}", reading.label, features)
        return images[0], reading.label
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in features]
    if len(labels) != 1:
        problem = f"has several label columns ({', '.join(labels)})" if labels else "has no column of class labels"
        raise DataError(
            f"{dataset} {problem}; name one of {', '.join(features)}, as in "
            f"{reading.name}?label={labels[0] if labels else 'COLUMN'}"
        )
    return images[0], labels[0]


def _is_grey(dataset: str) -> bool:
    """Whether images are read as grey ones; the first image decides for all, also for those of the other splits."""
    reading = _reading(dataset)
    if reading.channels is not None:
        return reading.channels == 1
    available = _hub(dataset)
    split = "train" if "train" in available else next(iter(available))
    return _hub_split(dataset, split)[0][_columns(dataset, split)[0]].mode in _GREY


def _labels(dataset: str, split: str) -> Any:
    if dataset == DIGITS:
        return _digits()[1].numpy()
    return _integers(dataset, _hub_split(dataset, split)[_columns(dataset, split)[1]][:])


def _integers(dataset: str, labels: Any) -> np.ndarray:
    """Labels as int64 (n,): class numbers from 0."""
    array = np.asarray(labels)
    if array.size and not (np.issubdtype(array.dtype, np.integer) and array.min() >= 0):
        raise DataError(f"the labels of {dataset} must be class numbers from 0; it has {labels[0]!r} and the like")
    return array.astype(np.int64)


def _all_pixels(dataset: str, images: Any, grey: bool, size: tuple[int, int] | None) -> list[np.ndarray]:
    """``_pixels`` of a column of images, which are decoded one after the other."""
    pixels = []
    try:
        for image in images:
            if size is None and max(image.size) > MOST_SIDE:
                raise DataError(
                    f"images may have {MOST_SIDE} pixels a side at most, not {max(image.size)}; say to which they are resized, "
                    f"as in {_reading(dataset).name}?size=32"
                )
            pixels.append(_pixels(image, grey, size))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise, or a row without an image
        raise DataError(f"an image of {dataset} cannot be read: {error}") from error
    return pixels


def _pixels(image: Any, grey: bool, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, C) uint8 of a PIL image, one channel or RGB, resized where a size (H, W) is given."""
    if image.mode[0] in "IF":
        raise DataError(f"images need 8 bits a channel; there is one of the mode {image.mode}")
    image = image.convert("L" if grey else "RGB")
    if size is not None and size != (image.height, image.width):
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if grey else pixels
