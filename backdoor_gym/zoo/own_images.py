"""Labelled images from what people have: tensors, a Dataset, a DataLoader, an .npz, a folder, or a named data set."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from . import datasets
from .datasets import DataSource, LabelledImages

Source = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any] | LabelledImages | str | Path

#: How many clean images are drawn from a named data set, where nothing is said.
CLEAN_IMAGES = 500
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


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


def own_images(source: Source, count: int | None = None, size: tuple[int, int] | None = None) -> OwnImages:
    """Images float32 (n, C, H, W) in [0, 1] with labels int64 (n,).

    Args:
        source: one of

            - a pair of tensors (images float32 (n, C, H, W) in [0, 1], labels int64 (n,));
            - a ``Dataset`` whose items begin with an image (a float32 tensor (C, H, W) in [0, 1], or a PIL image) and its label;
            - a ``DataLoader`` whose batches begin with images and labels in that form;
            - the path of an ``.npz`` (see ``read_npz``) or of a folder with one subfolder a class (see ``read_folder``);
            - a Hub id, a local folder in the Hub's layout, or "digits": images are drawn from the test split.
        count: how many to draw at random, always the same ones; by default all, or 500 of a named data set.
        size: height and width that the images of a folder or of a named data set (digits apart) are resized to.

    Raises:
        DataError: nothing of these, or images or labels of a wrong form.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix == ".npz":
            return OwnImages(_draw(LabelledImages(*read_npz(path)), count))
        if path.is_dir() and _is_image_folder(path):
            images, labels, classes = read_folder(path, size)
            return OwnImages(_draw(LabelledImages(images, labels), count), classes=classes)
        return _named(str(source), count, size)
    if isinstance(source, LabelledImages):
        return OwnImages(_draw(source, count))
    if isinstance(source, tuple | list) and len(source) == 2:
        return OwnImages(_draw(LabelledImages(*source), count))
    if isinstance(source, DataLoader):
        return OwnImages(_draw(_collect(source, batched=True), count))
    if isinstance(source, Dataset) or (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        return OwnImages(_draw(_collect(_items(source), batched=False), count))
    raise DataError(
        f"images must be a pair of tensors, a Dataset, a DataLoader, a path or a name, not {type(source).__name__}"
    )


def all_images(source: Source, size: tuple[int, int] | None = None) -> LabelledImages:
    """Images to score on: all of a source, or the test split of a named data set."""
    if isinstance(source, str | Path) and not _is_path(Path(source).expanduser()):
        name = _sized(str(source), size)
        split = datasets.splits(name)[1]
        indices = tuple(range(datasets.split_size(name, split)))
        return LabelledImages.from_source(DataSource(name, split, indices, datasets.fingerprint(name, split)))
    return own_images(source, None, size).images


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """The arrays ``images`` and ``labels`` of an .npz; one that holds pickled objects is refused.

    ``images`` are uint8 (n, H, W, C) or (n, H, W), or floats (n, C, H, W) in [0, 1]; ``labels`` are integers (n,).

    Raises:
        DataError: no such file, or other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"images", "labels"} <= set(file):
                raise DataError(f"{path} must hold the arrays images and labels; it holds {', '.join(file) or 'none'}")
            images, labels = file["images"], file["labels"]
    except DataError:
        raise
    except Exception as error:  # whatever a damaged archive makes its readers raise
        raise DataError(f"{path} cannot be read as an .npz without pickled objects: {error}") from error
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None])
        if pixels.shape[3] not in (1, 3):
            raise DataError(f"uint8 images must be (n, H, W, C) with 1 or 3 channels, not {images.shape} in {path}")
        tensor = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
    elif np.issubdtype(images.dtype, np.floating) and images.ndim == 4:
        tensor = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    else:
        raise DataError(
            f"images must be uint8 (n, H, W, C) or float (n, C, H, W) in [0, 1], not {images.dtype} {images.shape} in {path}"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers (n,), not {labels.dtype} {labels.shape} in {path}")
    return tensor, torch.from_numpy(labels.astype(np.int64))


def read_folder(folder: Path, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, int | None]:
    """Images, labels and the number of classes of a folder with one subfolder a class.

    Where the names of all subfolders are whole numbers, they are the labels, and how many classes there are is not known (None).
    Otherwise a label is the place of the name among all of them, sorted as text; a class without an image needs its empty folder.
    Images are grey if all of them are, and RGB otherwise.

    Args:
        folder: of the subfolders.
        size: height and width that images are resized to (bilinear, as PIL does it).

    Raises:
        DataError: a file that is no image, or images of different sizes where no size is given.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbered = all(name.isascii() and name.isdigit() for name in names)
    files = [
        (file, int(name) if numbered else label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"there is no image in the subfolders of {folder}; kinds: {', '.join(sorted(IMAGE_SUFFIXES))}")
    images = []
    for file, _ in files:
        try:
            with Image.open(file) as opened:
                images.append(_plain(opened, size))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} cannot be read as an image: {error}") from error
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DataError(
            f"the images in {folder} have different sizes (width x height: {sizes[0][0]}x{sizes[0][1]} and "
            f"{sizes[-1][0]}x{sizes[-1][1]}); give the size that the network takes (--image-size, image_size=)"
        )
    grey = all(image.mode == "L" for image in images)
    pixels = [_pixels(image if grey else image.convert("RGB")) for image in images]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return torch.stack(pixels), labels, None if numbered else len(names)


def _plain(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise OSError(f"mode {image.mode}: only images of 8 bits a channel are read")
    grey = image.mode in ("1", "L", "LA")
    plain = image.convert("L" if grey else "RGB")
    return plain if size is None else plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _pixels(image: Image.Image) -> Tensor:
    """float32 (C, H, W) in [0, 1] of a grey or RGB image."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (array[None] if array.ndim == 2 else array.permute(2, 0, 1)).float().div_(255)


def _is_path(path: Path) -> bool:
    return path.suffix == ".npz" or (path.is_dir() and _is_image_folder(path))


def _is_image_folder(folder: Path) -> bool:
    """Whether images lie right below its subfolders; in the Hub's layout (data/*.parquet, train/CLASS/*) they do not."""
    subfolders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return any(file.suffix.lower() in IMAGE_SUFFIXES for entry in subfolders for file in entry.iterdir())


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
    clean, rest = (
        LabelledImages.from_source(DataSource(dataset, split, tuple(sorted(chosen)), digest))
        for chosen in (order[:count], order[count:])
    )
    return OwnImages(clean, rest, datasets.num_classes(dataset, split))


def _draw(images: LabelledImages, count: int | None) -> LabelledImages:
    if count is None or count >= len(images):
        return images
    if count < 1:
        raise DataError(f"the number of clean images must be at least 1, not {count}")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values
    return LabelledImages(images.images[chosen], images.labels[chosen])


def _items(source: Any) -> Iterator[Any]:
    return iter(source) if not hasattr(source, "__len__") else (source[index] for index in range(len(source)))


def _collect(source: Iterable[Any], batched: bool) -> LabelledImages:
    """All images of a Dataset's items or of a DataLoader's batches."""
    what = "batch" if batched else "item"
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for item in source:
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) < 2:
            raise DataError(f"each {what} must begin with images and labels, not be a {type(item).__name__}")
        image = _pixels(_plain(item[0], None)) if isinstance(item[0], Image.Image) else item[0]
        label = torch.as_tensor(item[1])
        if not isinstance(image, Tensor) or image.ndim != (4 if batched else 3):
            shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"the image of each {what} must be a tensor ({'n, ' if batched else ''}C, H, W), not {shape}"
            )
        if label.is_floating_point() or label.ndim != (1 if batched else 0):
            raise DataError(f"the label of each {what} must be an integer, not {item[1]!r}")
        images.append(image if batched else image[None])
        labels.append(label.long().reshape(-1))
    if not images:
        raise DataError("there is no image; at least one is needed")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise DataError(f"the images have different shapes: {', '.join(map(str, sorted(shapes)[:3]))}")
    return LabelledImages(torch.cat(images).cpu(), torch.cat(labels).cpu())
