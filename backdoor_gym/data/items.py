"""Labelled images before they are read: how many there are, their labels where these are known, and a way to fetch them."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..errors import DataError
from ..files.npz import members, naming
from ..wording import first_line
from .arrays import as_images, as_labels
from .datasets import check_images
from .pictures import as_tensor, plain

#: Items of a data set that can be drawn from: their places are shuffled in memory.
MOST_ITEMS = 10**8


class Items(NamedTuple):
    """Labelled images, none of which is read yet.

    Attributes:
        fetch: from places to their images float32 (n, C, H, W) and labels int64 (n,); it reads no others.
        total: how many places there are.
        labels: of all places, where they are known without the images.
        classes: how many classes the source has, where it tells.
    """

    fetch: Callable[[list[int]], tuple[Tensor, Tensor]]
    total: int
    labels: list[int] | None
    classes: int | None = None


def draw(items: Items, count: int | None) -> list[int]:
    """The places of ``count`` images, always the same, in order; all of them where None.

    Where labels are known, the classes take turns until there are enough.

    Raises:
        DataError: less than one.

    Warns:
        UserWarning: fewer images than classes.
    """
    if count is None or count >= items.total:
        return list(range(items.total))
    if count < 1:
        raise DataError(f"the number of clean images must be at least 1, not {count}")
    order = torch.randperm(items.total, generator=torch.Generator().manual_seed(0)).tolist()
    if items.labels is not None:
        classes, seen, turn = len(set(items.labels)), Counter[int](), {}
        for index in order:
            seen[items.labels[index]] += 1
            turn[index] = seen[items.labels[index]]
        order.sort(key=turn.__getitem__)
        if count < classes:
            warnings.warn(
                f"{count} images are drawn of {classes} classes, so that {classes - count} have none, and a repair may lose "
                f"them unseen; draw {classes} or more (--clean-images, clean_images=)",
                UserWarning,
                stacklevel=3,
            )
    return sorted(order[:count])


def array_items(images: Any, labels: Any) -> Items:
    """Images and labels in memory (see ``as_images`` and ``as_labels``)."""
    pixels, numbers = as_images(images), as_labels(labels)
    check_images(pixels, numbers)

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        return (pixels, numbers) if len(chosen) == len(pixels) else (pixels[chosen], numbers[chosen])

    return Items(fetch, len(pixels), numbers.tolist())


def npz_items(path: Path) -> Items:
    """The arrays ``images`` and ``labels`` of an .npz (see ``as_images`` and ``as_labels``); pickled objects are refused."""
    images, labels = members(path, ("images", "labels"))
    with naming(path):
        numbers = as_labels(labels.read())
        if 0 in images.shape or images.shape[:1] != tuple(numbers.shape):
            raise DataError(
                f"labels must be one for each image, and images must have pixels, not {len(numbers)} and {images.shape}"
            )

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        with naming(path):
            return as_images(images.read(chosen if len(chosen) < len(numbers) else None)), numbers[chosen]

    return Items(fetch, len(numbers), numbers.tolist())


def loader_items(loader: DataLoader[Any], count: int | None) -> Items:
    """All batches of a DataLoader, or, where ``count`` are to be drawn, the items of its sampler, collated as it does."""
    data, batches = loader.dataset, loader.batch_sampler
    if count is None or batches is None or not has_items(data):
        return array_items(*_collect(_each(loader, "batch"), batched=True))
    places = sorted({int(index) for batch in batches for index in batch})
    labels = _known_labels(data)

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        items = _chosen(data, [places[index] for index in chosen], lambda item: loader.collate_fn([item]))
        return _collect(items, batched=True)

    return Items(fetch, len(places), None if labels is None else [labels[place] for place in places])


def dataset_items(source: Any) -> Items:
    """The items of a Dataset or a sequence, or of a stream, which is read to its end."""
    if not (has_items(source) and hasattr(source, "__len__")):
        return array_items(*_collect(_each(source, "item")))
    return Items(lambda chosen: _collect(_chosen(source, chosen)), _length(source), _known_labels(source))


def _length(source: Any) -> int:
    """How many items a Dataset says that it has.

    Raises:
        DataError: it says nothing usable, or more than can be drawn from.
    """
    try:
        length = len(source)
    except Exception as error:  # the user's code, which can raise anything
        raise DataError(
            f"the {type(source).__name__} does not tell how many items it has: {type(error).__name__}: {error}"
        ) from error
    if length > MOST_ITEMS:
        raise DataError(f"the {type(source).__name__} says that it has {length} items; {MOST_ITEMS} can be drawn from")
    return length


def has_items(source: Any) -> bool:
    """Whether items can be asked for one by one; streams inherit the method for it, too."""
    return hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)


def _known_labels(source: Any) -> list[int] | None:
    """The labels of a Dataset's items, where it tells them without making the items."""
    if isinstance(source, Subset):
        labels = _known_labels(source.dataset)
        return None if labels is None else [labels[index] for index in source.indices]
    tensors, samples = getattr(source, "tensors", None), getattr(source, "samples", None)
    for candidate in (
        getattr(source, "targets", None),
        getattr(source, "labels", None),
        [sample[1] for sample in samples] if isinstance(samples, list) else None,
        tensors[1] if isinstance(tensors, tuple) and len(tensors) > 1 else None,
    ):
        try:
            labels = [] if candidate is None else as_labels(candidate).tolist()
        except DataError:
            continue
        if len(labels) == len(source) > 0:
            return labels
    return None


def _chosen(source: Any, places: list[int], form: Callable[[Any], Any] = lambda item: item) -> Iterator[Any]:
    """Items of a Dataset by their places, in a form; ``DataError`` names the one at which its own code fails."""
    for place in places:
        try:
            item = form(source[place])
        except Exception as error:  # the user's code, which can raise anything
            raise _unreadable(source, f"item {place}", error, first_line(error)) from error
        yield item


def _each(source: Iterable[Any], what: str) -> Iterator[Any]:
    """All items or batches in order, likewise."""
    place = 0
    try:
        for item in source:
            yield item
            place += 1
    except DataError:
        raise
    except Exception as error:  # the user's code, which can raise anything
        lines = str(error).strip().splitlines() or [""]  # a process of a DataLoader says it in the last one
        raise _unreadable(source, f"{what} {place}", error, lines[-1]) from error


def _unreadable(source: Any, what: str, error: Exception, said: str) -> DataError:
    return DataError(f"{what} of the {type(source).__name__} cannot be read: {type(error).__name__}: {said}")


def _collect(source: Iterable[Any], batched: bool = False) -> tuple[Tensor, Tensor]:
    """Images and labels of a Dataset's items or of a DataLoader's batches."""
    what = "batch" if batched else "item"
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for item in source:
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) < 2:
            raise DataError(f"each {what} must begin with images and labels, not be a {type(item).__name__}")
        image, label = item[0], item[1]
        try:
            if isinstance(image, Image.Image):
                image = _of_pil(image)
            elif not batched and isinstance(image, Tensor | np.ndarray):
                image = image[None]
            if not batched:
                label = label[None] if isinstance(label, Tensor) else np.asarray(label)[None]
            images.append(as_images(image))
            labels.append(as_labels(label))
        except DataError as error:
            raise DataError(f"each {what} must begin with images and labels: {error}") from error
    if not images:
        raise DataError("there is no image; at least one is needed")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise DataError(f"the images have different shapes: {', '.join(map(str, sorted(shapes)[:3]))}")
    return torch.cat(images), torch.cat(labels)


def _of_pil(image: Image.Image) -> Tensor:
    """float32 (1, C, H, W) of an image that may not be unpacked yet."""
    try:
        return as_tensor([plain(image)])
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise DataError(f"an image cannot be read: {error}") from error
