"""Labelled images from what people have: tensors, a Dataset, a DataLoader, an .npz, a folder, or a named data set."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..arguments import check_kind, check_whole
from ..errors import DataError
from ..wording import first_line, shown
from . import datasets
from .checkpoints import is_archive
from .datasets import MOST_SIDE, DataSource, LabelledImages
from .npz import Member, members
from .plain import check_plain

Source = tuple[Any, Any] | Dataset[Any] | DataLoader[Any] | LabelledImages | str | Path

#: How many clean images are drawn from a named data set, where nothing is said.
CLEAN_IMAGES = 500
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
#: The same for Pillow, which tells them by their first bytes and knows many more: one of those is read by another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Pixels of an image that is resized, bytes of all that are drawn, and characters of a path.
MOST_PIXELS, MOST_HELD, MOST_CHARACTERS = 1 << 26, 1 << 34, 4096
#: How far rounding may take floats out of [0, 1].
ROUNDING = 1e-5


class OwnImages(NamedTuple):
    """Images of a source.

    Attributes:
        images: those asked for.
        rest: the other ones of a named data set, to score on; None where the source is none.
        classes: how many classes the source has, where it tells.
    """

    images: LabelledImages
    rest: LabelledImages | None = None
    classes: int | None = None


class _Items(NamedTuple):
    """What can be drawn from before any image is read.

    Attributes:
        fetch: images and labels of some places in it, of those alone.
        total: how many places there are.
        labels: of all places, where they are known without the images.
        classes: as in ``OwnImages``.
    """

    fetch: Callable[[list[int]], tuple[Tensor, Tensor]]
    total: int
    labels: list[int] | None
    classes: int | None = None


def own_images(source: Source, count: int | None = None, size: tuple[int, int] | None = None) -> OwnImages:
    """Images float32 (n, C, H, W) in [0, 1] with labels int64 (n,).

    Args:
        source: one of

            - a pair of tensors or arrays, images and labels (see ``as_images`` and ``as_labels``);
            - a ``Dataset`` whose items begin with an image, in such a form or as a PIL image, and its label;
            - a ``DataLoader`` whose batches begin with images and labels in that form;
            - the path of an ``.npz`` (see ``read_npz``) or of a folder with one subfolder a class (see ``read_folder``);
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
    if isinstance(source, str | Path):
        path = _own_path(source)
        if path is None:
            return _named(str(source), count, size)
        items = _folder_items(path, size) if path.is_dir() else _npz_items(path)
    elif isinstance(source, LabelledImages):
        if count is None or count >= len(source):
            return OwnImages(source, classes=source.classes)
        items = _arrays(source.images, source.labels)._replace(classes=source.classes)
    elif isinstance(source, Mapping | Tensor | np.ndarray) or _are_arrays(source):
        length = f" of {len(source)}" if isinstance(source, tuple) else ""
        raise DataError(
            f"images need their labels, and nothing else: give a pair (images, labels), not a {type(source).__name__}{length}"
        )
    elif _is_pair(source):
        pair: Any = source
        items = _arrays(*pair)
    elif isinstance(source, DataLoader):
        items = _loader_items(source, count)
    elif _is_map(source) and hasattr(source, "__len__"):
        items = _Items(lambda chosen: _collect(_asked(source, chosen)), len(source), _known_labels(source))
    elif isinstance(source, Dataset):
        stream: Any = source  # it has no length
        items = _arrays(*_collect(_each(stream, "item")))
    else:
        raise DataError(
            f"images must be a pair of tensors, a Dataset, a DataLoader, a path or a name, not {type(source).__name__}"
        )
    images, labels = items.fetch(_draw(items, count))
    return OwnImages(LabelledImages(images, labels, classes=items.classes), classes=items.classes)


def all_images(source: Source, size: tuple[int, int] | None = None) -> LabelledImages:
    """Images to score on: all of a source, or the test split of a named data set."""
    if isinstance(source, str | Path) and _own_path(source) is None:
        name = _sized(str(source), size)
        split = datasets.splits(name)[1]
        indices = tuple(range(datasets.split_size(name, split)))
        named = DataSource(name, split, indices, datasets.fingerprint(name, split))
        return LabelledImages.from_source(named, datasets.num_classes(name, split))
    return own_images(source, None, size).images


def as_images(images: Any) -> Tensor:
    """Images as float32 (n, C, H, W), where there is no doubt what is meant.

    Args:
        images: tensor or array, uint8 or floats in [0, 1]; (n, C, H, W), (n, H, W, C) with 1 or 3 channels, or (n, H, W) of
            grey. Where both orders would do, floats have the channels first and uint8 last.

    Raises:
        DataError: anything else.
    """
    if not isinstance(images, Tensor | np.ndarray):
        raise DataError(f"images must be a tensor or an array, not {type(images).__name__}")
    check_plain("images", images)
    shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    whole = kind == "uint8"
    if isinstance(images, np.ndarray) and (whole or np.issubdtype(images.dtype, np.floating)):
        images = torch.from_numpy(np.require(images, np.uint8 if whole else np.float32, ["C", "W"]))
    if not isinstance(images, Tensor) or not (whole or images.is_floating_point()):
        raise DataError(
            f"images must be uint8, or float in [0, 1], not {kind} {shape}: make them uint8, or divide by 255"
        )
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise DataError(f"images must be (n, C, H, W), (n, H, W, C) or (n, H, W), not {shape}")
    first, last = (images.shape[axis] in (1, 3) for axis in (1, 3))
    if whole and not (first or last):
        raise DataError(
            f"uint8 images must have 1 or 3 channels, not {shape} (transparency is the fourth: leave it out)"
        )
    square = images.shape[1] == images.shape[2]  # signals (n, C, length, 1) are floats too
    if last and (whole or (not first and (images.shape[3] == 3 or square))) and len(shape) == 4:
        images = images.permute(0, 3, 1, 2)
    pixels = images.detach().cpu().float().contiguous()
    if whole:
        return pixels.div_(255)
    if not pixels.numel():
        return pixels
    low, high = pixels.aminmax()
    rounded = (low < 0 or high > 1) and low >= -ROUNDING and high <= 1 + ROUNDING
    return pixels.clamp(0, 1) if rounded else pixels


def as_labels(labels: Any) -> Tensor:
    """Labels as int64 (n,), from integers (n,) or (n, 1), or from one-hot rows (n, classes), as a tensor, an array or a list.

    Raises:
        DataError: anything else.
    """
    check_plain("labels", labels, "integers (n,)")
    try:
        found = labels.detach().cpu() if isinstance(labels, Tensor) else np.asarray(labels)
        if isinstance(found, np.ndarray):
            check_plain("labels", found, "integers (n,)")
            integers = np.issubdtype(found.dtype, np.integer)
            found = torch.from_numpy(np.require(found, np.int64 if integers else found.dtype, ["C", "W"]))
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"labels must be integers (n,), not a {type(labels).__name__} of something else") from None
    if found.ndim == 2 and found.shape[1] > 1 and _is_one_hot(found):
        return found.argmax(1)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        kind = str(found.dtype).removeprefix("torch.")
        raise DataError(f"labels must be integers (n,), or one-hot (n, classes), not {kind} {tuple(found.shape)}")
    return found.long()


def fit_channels(network: nn.Module, images: LabelledImages) -> LabelledImages:
    """Images with as many channels as the network takes, where that changes nothing of what they show.

    Grey images get three equal channels for a network of colours; colour images whose channels are equal get one.

    Args:
        network: from float32 (n, C, H, W) to anything.
        images: those that it may not take.

    Raises:
        DataError: coloured images for a network of grey ones, or a named data set, whose name says how it is read.
    """
    channels = images.images.shape[1]
    few = torch.cat([images.images[:2]] * 2)[:2]  # some networks cannot take a single one
    if channels not in (1, 3) or _takes(network, few):
        return images
    wanted = 4 - channels
    if not _takes(network, few[:, :1].expand(-1, wanted, -1, -1)):
        return images  # it is not the channels
    if images.source is not None and images.source.dataset != datasets.DIGITS:
        name, option = images.source.dataset, f"channels={wanted}"
        kind = "grey" if wanted == 1 else "colour"
        raise DataError(
            f"the network cannot take images of shape {tuple(few.shape[1:])}: it takes {kind} ones; say how {name} is read, as in "
            f"{name}{'&' if '?' in name else '?'}{option}"
        )
    if wanted == 3:
        return LabelledImages(images.images.expand(-1, 3, -1, -1).contiguous(), images.labels, classes=images.classes)
    grey = images.images[:, :1].contiguous()
    coloured = int((images.images != grey).flatten(1).any(1).sum())
    if coloured:
        raise DataError(
            f"the network cannot take images of shape {tuple(few.shape[1:])}: it takes grey ones (one channel), and {coloured} of "
            f'{len(images)} are coloured; convert them to grey, as PIL\'s image.convert("L") does it'
        )
    return LabelledImages(grey, images.labels, classes=images.classes)


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """The arrays ``images`` and ``labels`` of an .npz (see ``as_images`` and ``as_labels``); pickled objects are refused.

    Raises:
        DataError: no such file, or other arrays.
    """
    items = _npz_items(path)
    return items.fetch(list(range(items.total)))


def _npz_items(path: Path) -> _Items:
    """The labels are read now, and images when they are drawn."""
    images, labels = members(path, ("images", "labels"))

    def read(member: Member, chosen: list[int] | None, make: Callable[[Any], Tensor]) -> Tensor:
        try:
            return make(member.read(chosen))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:  # whatever a damaged archive makes its readers raise
            raise DataError(f"{path} cannot be read as an .npz without pickled objects: {first_line(error)}") from error

    numbers = read(labels, None, as_labels)
    if 0 in images.shape or images.shape[:1] != tuple(numbers.shape):
        raise DataError(
            f"{path}: labels must be one for each image, and images must have pixels, not {len(numbers)} and {images.shape}"
        )

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        return read(images, chosen if len(chosen) < len(numbers) else None, as_images), numbers[chosen]

    return _Items(fetch, len(numbers), numbers.tolist())


def read_folder(
    folder: Path, size: tuple[int, int] | None = None, count: int | None = None
) -> tuple[Tensor, Tensor, int | None]:
    """Images, labels and the number of classes of a folder with one subfolder a class.

    Where the names of all subfolders are whole numbers, they are the labels, and how many classes there are is not known (None).
    Otherwise a label is the place of the name among all of them, sorted as text; a class without an image needs its empty folder.
    Images are grey if all that are read are, and RGB otherwise.

    Args:
        folder: of the subfolders.
        size: height and width that images are resized to (bilinear, as PIL does it).
        count: how many are drawn, by the names of the files; only those are opened.

    Raises:
        DataError: a file that is no image, or images of different sizes where no size is given.
    """
    items = _folder_items(folder, size)
    return *items.fetch(_draw(items, count)), items.classes


def _folder_items(folder: Path, size: tuple[int, int] | None) -> _Items:
    names = sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))
    numbered = all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)
    files = [
        (folder / name / file, int(name) if numbered else label)
        for label, name in enumerate(names)
        for file in sorted(entry.name for entry in _entries(folder / name) if _is_image_file(entry))
    ]
    if not files:
        raise DataError(f"there is no image in the subfolders of {folder}; kinds: {', '.join(sorted(IMAGE_SUFFIXES))}")

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        some = [files[index] for index in chosen]
        return _read_files(folder, [file for file, _ in some], size), torch.tensor([label for _, label in some])

    return _Items(fetch, len(files), [label for _, label in files], None if numbered else len(names))


def _read_files(folder: Path, files: list[Path], size: tuple[int, int] | None) -> Tensor:
    images = []
    for file in files:
        try:
            with Image.open(file, "r", FORMATS) as opened:
                _check_opened(opened, size)
                images.append(_plain(opened, size))
        except Exception as error:  # whatever a damaged file makes its readers raise
            raise DataError(f"{file} cannot be read as an image: {error}") from error
        if len(images) == 1:
            _check_room(len(files), images[0])
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DataError(
            f"the images in {folder} have different sizes (width x height: {sizes[0][0]}x{sizes[0][1]} and "
            f"{sizes[-1][0]}x{sizes[-1][1]}); give the size that the network takes (--image-size, image_size=)"
        )
    grey = all(image.mode == "L" for image in images)
    return torch.stack([_pixels(image if grey else image.convert("RGB")) for image in images])


def _check_opened(image: Image.Image, size: tuple[int, int] | None) -> None:
    """Raise ``DataError`` for an image that its header says is too large, or more than one, before it is unpacked."""
    width, height = image.size
    if size is None and max(width, height) > MOST_SIDE:
        raise DataError(
            f"it has {width}x{height} pixels, and {MOST_SIDE} a side are the most; give the size that the network takes "
            "(--image-size, image_size=)"
        )
    if width * height > MOST_PIXELS:
        raise DataError(f"it has {width}x{height} pixels; {MOST_PIXELS:,} are the most")
    if image.format != "JPEG" and getattr(image, "is_animated", False):
        raise DataError("it holds several pictures; save the one that is meant alone")


def _check_room(count: int, image: Image.Image) -> None:
    """Raise ``DataError`` where so many images like this one would take more memory than ``MOST_HELD``."""
    size = 4 * count * len(image.getbands()) * image.width * image.height
    if size > MOST_HELD:
        raise DataError(
            f"{count} images of {image.width}x{image.height} pixels take {size >> 30} GiB; draw fewer "
            "(--clean-images, clean_images=), or give the size that the network takes (--image-size, image_size=)"
        )


def _plain(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"mode {image.mode}: only images of 8 bits a channel are read")
    grey = image.mode in ("1", "L", "LA")
    plain = image.convert("L" if grey else "RGB")
    return plain if size is None else plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _of_pil(image: Image.Image) -> Tensor:
    """``_pixels`` of an image that may not be unpacked yet."""
    try:
        return _pixels(_plain(image, None))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise DataError(f"an image cannot be read: {error}") from error


def _pixels(image: Image.Image) -> Tensor:
    """float32 (C, H, W) in [0, 1] of a grey or RGB image."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (array[None] if array.ndim == 2 else array.permute(2, 0, 1)).float().div_(255)


def _own_path(source: str | Path) -> Path | None:
    """The .npz or the folder of classes that is meant; None for what is read as a named data set.

    Raises:
        DataError: a file or a folder of another kind, or a ``Path`` of none: no name of it is sent to the Hub.
    """
    path = Path(os.path.expanduser(source))
    if len(str(source)) > MOST_CHARACTERS or "\0" in str(source):
        raise DataError(f"{shown(str(source))} is no path, and no name of a data set")
    if path.suffix.lower() == ".npz":
        return path
    if path.is_dir():
        if _is_image_folder(path):
            return path
        if any(_suffix(entry) in IMAGE_SUFFIXES for entry in _entries(path)):
            raise DataError(
                f"{path} has images right in it, and nothing tells their labels: put those of each class into a subfolder of its "
                f"own, such as {path / 'cat' / '1.png'}"
            )
        return None
    if str(source) == datasets.DIGITS:
        return None
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
    return None


def _is_image_folder(folder: Path) -> bool:
    """Whether images lie right below its subfolders; in the Hub's layout (data/*.parquet, train/CLASS/*) they do not."""
    subfolders = (entry for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))
    return any(_suffix(file) in IMAGE_SUFFIXES for entry in subfolders for file in _entries(Path(entry.path)))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, one after the other.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or leads to one, and has the name of an image; what is no file may not end when it is read."""
    try:
        return _suffix(entry) in IMAGE_SUFFIXES and entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _check_size(size: Any) -> None:
    """Raise ``DataError`` unless it is None, or a height and a width that images may be resized to."""
    if size is None:
        return
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise DataError(f"the size of images must be (height, width), not {shown(size)}")
    for side in size:
        check_whole("a side that images are resized to", side, 1)
        if side > MOST_SIDE:
            raise DataError(f"images may be resized to {MOST_SIDE} pixels a side at most, not {shown(size)}")


def _sized(dataset: str, size: tuple[int, int] | None) -> str:
    """The name with the size that its images are to have, where it says none itself."""
    if size is None or dataset == datasets.DIGITS or "size=" in dataset:
        return dataset
    return f"{dataset}{'&' if '?' in dataset else '?'}size={size[0]}x{size[1]}"


def _named(dataset: str, count: int | None, sides: tuple[int, int] | None) -> OwnImages:
    """Some images of the test split of a named data set, and the rest of them."""
    dataset = _sized(dataset, sides)
    split = datasets.splits(dataset)[1]
    size, digest = datasets.split_size(dataset, split), datasets.fingerprint(dataset, split)
    count = min(CLEAN_IMAGES, size // 2) if count is None else count
    if not 0 < count < size:
        raise DataError(f"the number of clean images must be 1 to {size - 1} of {dataset}, split {split}, not {count}")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    classes = datasets.num_classes(dataset, split)
    clean, rest = (
        LabelledImages.from_source(DataSource(dataset, split, tuple(sorted(chosen)), digest), classes)
        for chosen in (order[:count], order[count:])
    )
    return OwnImages(clean, rest, classes)


def _draw(items: _Items, count: int | None) -> list[int]:
    """Which places are drawn: at random, and where the labels are known each class in its turn until there are enough."""
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


def _are_arrays(source: Any) -> bool:
    """Whether it is images without labels, or with more than these."""
    if not isinstance(source, tuple) or len(source) == 2:  # a list may hold items
        return False
    return bool(source) and all(isinstance(one, Tensor | np.ndarray) for one in source)


def _is_pair(source: Any) -> bool:
    """Whether it is images and labels; a list of two may also be a data set of two items."""
    return isinstance(source, tuple | list) and len(source) == 2 and not isinstance(source[0], tuple | list)


def _is_map(source: Any) -> bool:
    """Whether items can be asked for one by one; streams inherit the method for it, too."""
    return hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)


def _arrays(images: Any, labels: Any) -> _Items:
    """What is in memory."""
    pixels, numbers = as_images(images), as_labels(labels)
    datasets.check_images(pixels, numbers)

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        return (pixels, numbers) if len(chosen) == len(pixels) else (pixels[chosen], numbers[chosen])

    return _Items(fetch, len(pixels), numbers.tolist())


def _loader_items(loader: DataLoader[Any], count: int | None) -> _Items:
    """The batches of a DataLoader; where some are drawn, the items that its sampler may give, put together as it does it."""
    data, batches = loader.dataset, loader.batch_sampler
    if count is None or batches is None or not _is_map(data):
        return _arrays(*_collect(_each(loader, "batch"), batched=True))
    places = sorted({int(index) for batch in batches for index in batch})
    known = _known_labels(data)
    labels = None if known is None else [known[place] for place in places]

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        items = _asked(data, [places[index] for index in chosen], lambda item: loader.collate_fn([item]))
        return _collect(items, batched=True)

    return _Items(fetch, len(places), labels)


def _known_labels(source: Any) -> list[int] | None:
    """The labels of a Dataset's items, where it tells them without making the items; None elsewhere."""
    if isinstance(source, Subset):
        known = _known_labels(source.dataset)
        return None if known is None else [known[index] for index in source.indices]
    tensors, samples = getattr(source, "tensors", None), getattr(source, "samples", None)
    for told in (
        getattr(source, "targets", None),
        getattr(source, "labels", None),
        [sample[1] for sample in samples] if isinstance(samples, list) else None,
        tensors[1] if isinstance(tensors, tuple) and len(tensors) > 1 else None,
    ):
        try:
            found: list[int] = [] if told is None else as_labels(told).tolist()
        except DataError:
            continue
        if len(found) == len(source) > 0:
            return found
    return None


def _asked(source: Any, chosen: Iterable[int], made: Callable[[Any], Any] = lambda item: item) -> Iterator[Any]:
    """Items of a Dataset, by their places; what its own code raises is told."""
    for place in chosen:
        try:
            item = made(source[place])
        except Exception as error:  # the user's code, which can raise anything
            raise DataError(
                f"item {place} of the {type(source).__name__} cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error
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
        said = [line for line in str(error).strip().splitlines() if line] or [
            ""
        ]  # a process of a DataLoader tells it last
        raise DataError(
            f"{what} {place} of the {type(source).__name__} cannot be read: {type(error).__name__}: {said[-1]}"
        ) from error


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
            if not batched and isinstance(image, Tensor | np.ndarray):
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


def _is_one_hot(rows: Tensor) -> bool:
    return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())


def _takes(network: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            network(images.clone().to(next((parameter.device for parameter in network.parameters()), "cpu")))
    except Exception:  # the user's code, which can raise anything
        return False
    return True
