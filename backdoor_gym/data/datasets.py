"""Labelled images: those of a named data set, read when they are asked for, and those in memory.

A data set is named ``digits`` (scikit-learn's), by its Hub id, or by a local folder in the Hub's layout; how it is read may follow
its name (see ``hub``).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files.plain import check_plain
from ..files.schemas import DatasetName, fits
from . import hub
from .hub import DIGITS


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

    Attributes:
        source: the named images; None for others.
        classes: how many classes the place has that they were read from, where it tells: a network of another number means
            other things by its labels.

    Raises:
        DataError: wrong shape, dtype or range, lengths that differ, or no image at all.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int | None = None) -> None:
        check_images(images, labels)
        self._data: tuple[Tensor, Tensor] | None = (images, labels)
        self.source: DataSource | None = None
        self.classes = classes

    @classmethod
    def from_source(cls, source: DataSource, classes: int | None = None) -> Self:
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
        return len(self.labels) if self.source is None else len(self.source.indices)

    @property
    def images(self) -> Tensor:
        """float32 (n, C, H, W) in [0, 1]."""
        return self._read()[0]

    @property
    def labels(self) -> Tensor:
        """int64 (n,)."""
        return self._read()[1]

    def first(self, count: int | None) -> "LabelledImages":
        """The first ``count`` of them (all where None or fewer)."""
        if count is None or count >= len(self):
            return self
        if self._data is None and self.source is not None:
            return LabelledImages.from_source(replace(self.source, indices=self.source.indices[:count]))
        return LabelledImages(self.images[:count], self.labels[:count])

    def _read(self) -> tuple[Tensor, Tensor]:
        if self._data is None:
            assert self.source is not None
            data = load_images(self.source.dataset, self.source.split, self.source.indices)
            check_images(*data)
            self._data = data  # only now: what is refused once is refused again
        return self._data


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise ``DataError`` unless images are float32 (n, C, H, W) in [0, 1] with int64 labels (n,), n > 0."""
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DataError(f"images and labels must be tensors, not {type(images).__name__} and {type(labels).__name__}")
    check_plain("images", images)
    check_plain("labels", labels)
    if images.ndim != 4:
        raise DataError(f"images must have the shape (n, C, H, W), not {tuple(images.shape)}")
    if images.numel() == 0:
        what = "the images have no pixels" if len(images) else "there is no image; at least one is needed"
        raise DataError(f"{what}: their shape is {tuple(images.shape)}")
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


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ``DataError`` unless every label is one of 0 to ``num_classes`` - 1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels must be 0 to {num_classes - 1}; they span {low} to {high}")


def load_images(dataset: str, split: str, indices: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Images float32 (n, C, H, W) in [0, 1] and labels int64 (n,) of a split; all of it where ``indices`` is None.

    Raises:
        DataError: the data set, the split or an index does not exist, or it holds no labelled images.
    """
    size = split_size(dataset, split)
    if indices is not None and len(indices) and not 0 <= min(indices) <= max(indices) < size:
        raise DataError(f"{dataset}, split {split}, has {size} images; indices reach {max(indices)}")
    if dataset != DIGITS:
        return hub.images_and_labels(dataset, split, indices)
    images, labels = _digits()
    chosen = slice(None) if indices is None else torch.as_tensor(indices, dtype=torch.long)
    return images[chosen], labels[chosen]


def split_size(dataset: str, split: str) -> int:
    """Number of images of a split."""
    return len(_digits()[1]) if dataset == DIGITS else len(hub.split_of(dataset, split))


def image_shape(dataset: str, split: str) -> tuple[int, int, int]:
    """(C, H, W) of the images of a split."""
    channels, height, width = load_images(dataset, split, [0])[0].shape[1:]
    return channels, height, width


def num_classes(dataset: str, split: str) -> int:
    """Number of classes of a split."""
    if dataset == DIGITS:
        return 10
    feature = hub.split_of(dataset, split).features[hub.columns(dataset, split)[1]]
    return getattr(feature, "num_classes", None) or int(max(hub.labels_of(dataset, split))) + 1


def fingerprint(dataset: str, split: str) -> str:
    """Digest of the labels of a split, in order."""
    labels = _digits()[1].numpy() if dataset == DIGITS else hub.labels_of(dataset, split)
    return hashlib.sha256(labels.tobytes()).hexdigest()[:16]


def splits(dataset: str) -> tuple[str, str]:
    """The names of the split to train on and of the one to test on."""
    if dataset == DIGITS:
        return "all", "all"
    available = hub.all_splits(dataset)
    test = next((name for name in ("test", "validation", "valid") if name in available), None)
    if "train" not in available or test is None:
        raise DataError(f"{dataset} needs the splits train and test (or validation); it has {', '.join(available)}")
    return "train", test


def named_in_file(dataset: str) -> str:
    """The name of a data set as a model's file gives it: ``digits`` or a name of the Hub, with reading options.

    A file may say anything, so it opens no folder of this machine.

    Raises:
        DataError: another name, or one that is also a folder here.
    """
    hint = "say which data set is meant: --data NAME_OR_FOLDER (data=)"
    if not fits(dataset, DatasetName):
        raise DataError(f"the model names the data set {dataset!r}, which is neither {DIGITS} nor OWNER/NAME; {hint}")
    if dataset != DIGITS and os.path.exists(hub.Reading.of(dataset).name):
        raise DataError(f"the model names the data set {dataset}, and a folder here is called so too; {hint}")
    return dataset


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float().div_(16).unsqueeze(1), torch.from_numpy(data.target).long()
