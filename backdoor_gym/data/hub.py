"""Named data sets of the Hub, or of a local folder in its layout: where they are, and how they are read.

A name is a Hub id (``uoft-cs/cifar10``) or a local folder. Where the environment variable ``BACKDOOR_GYM_DATA`` names a folder, a
Hub id is looked for there first, under its last part (``cifar10``).

Options may follow the name after a question mark, joined by ``&`` (``tanganke/gtsrb?size=32``,
``uoft-cs/cifar100?label=fine_label&size=24x32``). They are part of the name, so that a saved model's images are read alike:

- ``label=COLUMN``: the label column. Needed where there are several, or where it is neither of class labels nor called
  "label" or "labels";
- ``size=SIDE`` or ``size=HEIGHTxWIDTH``: images are resized to it, bilinear and smoothed where they shrink. Needed where
  they differ in size;
- ``channels=1`` or ``channels=3``: grey or colour. Default: as the first image is.
"""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, check_name
from ..wording import first_line
from .pictures import GREY, MOST_SIDE, as_tensor, plain

DIGITS = "digits"
DATA_VARIABLE = "BACKDOOR_GYM_DATA"
OPTIONS = ("label", "size", "channels")
#: A name of the Hub; whatever else is no folder is never sent to it.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
#: Ends of names by which a misspelt file is told from a data set of the Hub.
_OF_FILES = re.compile(
    r"\.(7z|arrow|bin|bmp|bz2|ckpt|csv|gif|gz|h5|hdf5|jpe?g|jsonl?|mat|np[yz]|onnx|parquet|pickle|pkl|png|pth?|rar|safetensors|"
    r"t[ag][rz]|tiff?|[ct]sv|txt|webp|xz|zip|zst)$",
    re.IGNORECASE,
)
_SIZE = re.compile(r"(\d{1,9})(?:x(\d{1,9}))?", re.ASCII)


class Reading(NamedTuple):
    """A name without its options, and the options."""

    name: str
    label: str | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None

    @classmethod
    def of(cls, dataset: str) -> "Reading":
        """The parts of a name; raise ``UnknownNameError`` for an unknown option, ``DataError`` for an unusable value."""
        name, sign, text = dataset.partition("?")
        if name == DIGITS:
            raise DataError(f"{DIGITS} has no options, so not {dataset}")
        options: dict[str, Any] = {}
        for part in text.split("&") if sign else ():
            option, _, value = part.partition("=")
            check_name("option of a data set", option, OPTIONS)
            options[option] = value
            if option == "size":
                sides = _SIZE.fullmatch(value)
                options[option] = size = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
                if not 0 < min(size) <= max(size) <= MOST_SIDE:
                    raise DataError(f"size must be SIDE or HEIGHTxWIDTH, of 1 to {MOST_SIDE} pixels, not {value!r}")
            elif option == "channels":
                if value not in ("1", "3"):
                    raise DataError(f"channels must be 1 or 3, not {value!r}")
                options[option] = int(value)
        return cls(name, **options)


def all_splits(dataset: str) -> Any:
    """The splits by name, as the library ``datasets`` gives them (see ``load``)."""
    name = Reading.of(dataset).name
    return load(_location(name), name)


def split_of(dataset: str, split: str) -> Any:
    """The split of that name; raise ``UnknownNameError`` where there is none."""
    available = all_splits(dataset)
    check_name(f"split of {dataset}", split, available)
    return available[split]


def columns(dataset: str, split: str) -> tuple[str, str]:
    """The names of the image and the label column; raise ``DataError`` where there is no such, or several label columns."""
    import datasets

    features, reading = split_of(dataset, split).features, Reading.of(dataset)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise DataError(f"{dataset} needs an image column; it has {', '.join(features)}")
    if reading.label is not None:
        check_name(f"column of {reading.name}", reading.label, features)
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


def images_and_labels(dataset: str, split: str, indices: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Images float32 (n, C, H, W) in [0, 1] and labels int64 (n,); all where ``indices`` is None.

    Raises:
        DataError: images that cannot be read, or differ in size; labels that are no class numbers.
    """
    rows = split_of(dataset, split)
    rows = rows if indices is None else rows.select(indices)
    (image_column, label_column), reading, grey = columns(dataset, split), Reading.of(dataset), _is_grey(dataset)
    images: list[Image.Image] = []
    try:
        for image in rows[image_column]:
            if reading.size is None and max(image.size) > MOST_SIDE:
                raise DataError(
                    f"images may have {MOST_SIDE} pixels a side at most, not {max(image.size)}; say to which they are resized, "
                    f"as in {reading.name}?size=32"
                )
            images.append(plain(image, reading.size, grey))
    except Exception as error:  # whatever a damaged file makes its readers raise, or a row without an image
        raise DataError(f"an image of {dataset} cannot be read: {error}") from error
    shapes = sorted({(image.height, image.width) for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"the images of {dataset} have different sizes ({shapes[0]} and {shapes[-1]}); say to which they are resized, as "
            f"in {reading.name}?size=32"
        )
    return as_tensor(images), torch.from_numpy(_integers(dataset, rows[label_column]))


def labels_of(dataset: str, split: str) -> np.ndarray:
    """All labels of a split, int64 (n,)."""
    return _integers(dataset, split_of(dataset, split)[columns(dataset, split)[1]][:])


def _location(name: str) -> str:
    """Where to read it: a local folder, a local copy of a Hub id, or the name itself where it has the form of a Hub id.

    Raises:
        DataError: none of these: names of local files are nobody else's business.
    """
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return os.path.abspath(folder)  # a bare name may also be that of a builder in the library
    root = os.environ.get(DATA_VARIABLE)
    if root and os.path.isdir(local := os.path.join(root, name.rsplit("/", 1)[-1])):
        return os.path.abspath(local)
    if os.path.exists(folder):
        raise DataError(f"{name} is a file; a data set is a folder, or OWNER/NAME on the Hub")
    if not _HUB_ID.fullmatch(name) or _OF_FILES.search(name) or os.path.isdir(os.path.dirname(folder) or "."):
        raise DataError(
            f"there is no file or folder {name}, nor one of that name under ${DATA_VARIABLE}; a data set of the Hub is "
            f"named OWNER/NAME, as in uoft-cs/cifar10"
        )
    return name


@lru_cache(maxsize=4)
def load(location: str, name: str) -> Any:
    """The splits at a location; raise ``DataError`` where the library is not installed, or cannot read them."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"the data set {name} needs the extra: pip install 'backdoor-gym[hub]'") from error
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(location)
    except Exception as error:  # the library raises many kinds, each with a long text
        raise DataError(
            f"cannot read the data set {name!r} ({first_line(error)}); it must be a Hub id, a folder of that name under "
            f"${DATA_VARIABLE}, or a local folder: in the Hub's layout, or with one subfolder a class and the images right in it"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _is_grey(dataset: str) -> bool:
    """Whether images are read as grey ones; the first image decides for all, also for those of the other splits."""
    channels = Reading.of(dataset).channels
    if channels is not None:
        return channels == 1
    available = all_splits(dataset)
    split = "train" if "train" in available else next(iter(available))
    return split_of(dataset, split)[0][columns(dataset, split)[0]].mode in GREY


def _integers(dataset: str, labels: Any) -> np.ndarray:
    """Labels as int64 (n,): class numbers from 0."""
    array = np.asarray(labels)
    if array.size and not (np.issubdtype(array.dtype, np.integer) and array.min() >= 0):
        raise DataError(f"the labels of {dataset} must be class numbers from 0; it has {labels[0]!r} and the like")
    return array.astype(np.int64)
