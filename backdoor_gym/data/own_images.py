"""Labelled images from what people have: tensors, a Dataset, a DataLoader, an .npz, a folder, or a named data set."""

import os
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..arguments import check_kind, check_whole
from ..errors import DataError
from ..files.checkpoints import is_archive
from ..wording import shown
from . import datasets
from .datasets import DataSource, LabelledImages
from .folders import folder_items, holds_images, is_image_folder
from .items import Items, array_items, dataset_items, draw, has_items, loader_items, npz_items
from .pictures import MOST_SIDE

Source = tuple[Any, Any] | Dataset[Any] | DataLoader[Any] | LabelledImages | str | Path

#: How many clean images are drawn from a named data set, where nothing is said.
CLEAN_IMAGES = 500
#: Characters of a path.
MOST_CHARACTERS = 4096


class OwnImages(NamedTuple):
    """Images of a source.

    Attributes:
        images: those asked for.
        rest: the other ones of a named data set, to score on.
        classes: how many classes the source has, where it tells.
    """

    images: LabelledImages
    rest: LabelledImages | None = None
    classes: int | None = None


def own_images(source: Source, count: int | None = None, size: tuple[int, int] | None = None) -> OwnImages:
    """Images float32 (n, C, H, W) in [0, 1] with labels int64 (n,).

    Args:
        source: one of

            - a pair of tensors or arrays, images and labels (see ``as_images`` and ``as_labels``);
            - a ``Dataset`` whose items begin with an image, in such a form or as a PIL image, and its label;
            - a ``DataLoader`` whose batches begin with images and labels in that form;
            - the path of an ``.npz`` (see ``npz_items``) or of a folder with one subfolder a class (see ``folder_items``);
            - a Hub id, a local folder in the Hub's layout, or "digits": images are drawn from the test split.
        count: how many to draw at random, always the same ones; by default all, or 500 of a named data set. Where labels are
            known without the images (a folder, tensors, a ``Dataset`` with ``targets``, ``labels``, ``samples`` or
            ``tensors``), as many of each class as there are; only what is drawn is read.
        size: height and width that the images of a folder or of a named data set (digits apart) are resized to.

    Raises:
        DataError: nothing of these, or images or labels of a wrong form.

    Warns:
        UserWarning: ``count`` is smaller than the number of classes.
    """
    _check_size(size)
    check_kind("the number of clean images", count, Integral, "a whole number", may_be_none=True)
    if isinstance(source, LabelledImages) and (count is None or count >= len(source)):
        return OwnImages(source, classes=source.classes)
    if _is_named(source):
        return _named(str(source), count, size)
    items = _items(source, count, size)
    images, labels = items.fetch(draw(items, count))
    return OwnImages(LabelledImages(images, labels, items.classes), classes=items.classes)


def all_images(source: Source, size: tuple[int, int] | None = None) -> LabelledImages:
    """Images to score on: all of a source, or the test split of a named data set."""
    if not _is_named(source):
        return own_images(source, None, size).images
    name = _sized(str(source), size)
    split = datasets.splits(name)[1]
    return _of_split(name, split, range(datasets.split_size(name, split)))


def _items(source: Any, count: int | None, size: tuple[int, int] | None) -> Items:
    if isinstance(source, str | Path):
        path = _own_path(source)
        return folder_items(path, size) if path.is_dir() else npz_items(path)
    if isinstance(source, LabelledImages):
        return array_items(source.images, source.labels)._replace(classes=source.classes)
    if isinstance(source, tuple | list) and len(source) == 2 and not isinstance(source[0], tuple | list):
        return array_items(*source)  # a list of two may also be a data set of two items
    if isinstance(source, DataLoader):
        return loader_items(source, count)
    if isinstance(source, Dataset) or (has_items(source) and hasattr(source, "__len__")):
        return dataset_items(source)
    raise DataError(
        f"images must be a pair of tensors, a Dataset, a DataLoader, a path or a name, not {type(source).__name__}"
    )


def _named(dataset: str, count: int | None, size: tuple[int, int] | None) -> OwnImages:
    """Some images of the test split of a named data set, and the rest of them."""
    dataset = _sized(dataset, size)
    split = datasets.splits(dataset)[1]
    total = datasets.split_size(dataset, split)
    count = min(CLEAN_IMAGES, total // 2) if count is None else count
    if not 0 < count < total:
        raise DataError(f"the number of clean images must be 1 to {total - 1} of {dataset}, split {split}, not {count}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    clean, rest = (_of_split(dataset, split, sorted(chosen)) for chosen in (order[:count], order[count:]))
    return OwnImages(clean, rest, clean.classes)


def _of_split(dataset: str, split: str, indices: Any) -> LabelledImages:
    source = DataSource(dataset, split, tuple(indices), datasets.fingerprint(dataset, split))
    return LabelledImages.from_source(source, datasets.num_classes(dataset, split))


def _sized(dataset: str, size: tuple[int, int] | None) -> str:
    """The name with the size that its images are resized to, where it says none itself."""
    if size is None or dataset == datasets.DIGITS or "size=" in dataset:
        return dataset
    return f"{dataset}{'&' if '?' in dataset else '?'}size={size[0]}x{size[1]}"


def _is_named(source: Any) -> bool:
    """Whether a text or a path is read as the name of a data set.

    Raises:
        DataError: it is neither a name, nor an .npz or a folder of classes. No ``Path`` is sent to the Hub.
    """
    if not isinstance(source, str | Path):
        return False
    if len(str(source)) > MOST_CHARACTERS or "\0" in str(source):
        raise DataError(f"{shown(str(source))} is no path, and no name of a data set")
    path = _own_path(source)
    if path.suffix.lower() == ".npz":
        return False
    if path.is_dir():
        if is_image_folder(path):
            return False
        if holds_images(path):
            raise DataError(
                f"{path} has images right in it, and nothing tells their labels: put those of each class into a subfolder of its "
                f"own, such as {path / 'cat' / '1.png'}"
            )
        return True
    if str(source) == datasets.DIGITS:
        return True
    if path.is_file() and is_archive(path):
        raise DataError(f"{path} is an archive: unpack it first, and name the .npz or the folder that was in it")
    if path.is_file():
        raise DataError(
            f"{path} is no kind of file that images are read from: those are an .npz with the arrays images and labels, or a "
            "folder with one subfolder a class (in Python also tensors and a Dataset)"
        )
    if os.path.exists(path):
        raise DataError(f"{path} is neither a file nor a folder, and is not opened")
    if isinstance(source, Path):
        raise DataError(f"there is no file or folder {path}")
    return True


def _own_path(source: str | Path) -> Path:
    return Path(os.path.expanduser(source))


def _check_size(size: Any) -> None:
    """Raise ``DataError`` unless it is None, or a height and a width that images may be resized to."""
    if size is None:
        return
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise DataError(f"the size of images must be (height, width), not {shown(size)}")
    for side in size:
        check_whole("a side that images are resized to", side, 1)
    if max(size) > MOST_SIDE:
        raise DataError(f"images may be resized to {MOST_SIDE} pixels a side at most, not {shown(size)}")
