"""Folders of images, with one subfolder a class."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .items import Items
from .pictures import SUFFIXES, as_tensor, open_picture

#: Bytes of all images that are drawn, as float32.
MOST_HELD = 1 << 34


def folder_items(folder: Path, size: tuple[int, int] | None) -> Items:
    """The images below a folder; only files that are drawn are opened.

    Where the names of all subfolders are whole numbers, they are the labels, and the number of classes is not known. Otherwise a
    label is the place of the name among all of them, sorted as text; a class without an image needs its empty folder. Images are
    grey if all that are drawn are, and RGB otherwise, and resized to ``size`` (height, width).

    Raises:
        DataError: no image; when they are drawn: a file that is no image, too much memory, or different sizes.
    """
    names, numbered = class_names(folder)
    files = [
        (folder / name / file, int(name) if numbered else label)
        for label, name in enumerate(names)
        for file in sorted(entry.name for entry in _entries(folder / name) if _is_image_file(entry))
    ]
    if not files:
        raise DataError(f"there is no image in the subfolders of {folder}; kinds: {', '.join(sorted(SUFFIXES))}")

    def fetch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        images = _read_files(folder, [files[index][0] for index in chosen], size)
        return images, torch.tensor([files[index][1] for index in chosen])

    return Items(fetch, len(files), [label for _, label in files], None if numbered else len(names))


def class_names(folder: Path) -> tuple[list[str], bool]:
    """The sorted names of the subfolders, and whether all are numbers: the labels themselves."""
    names = sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))
    return names, all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)


def is_image_folder(folder: Path) -> bool:
    """Whether images lie right below its subfolders; in the Hub's layout (data/*.parquet, train/CLASS/*) they do not."""
    subfolders = (entry for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))
    return any(holds_images(Path(entry.path)) for entry in subfolders)


def holds_images(folder: Path) -> bool:
    """Whether a file right in it has the name of an image."""
    return any(_suffix(entry) in SUFFIXES for entry in _entries(folder))


def _read_files(folder: Path, files: list[Path], size: tuple[int, int] | None) -> Tensor:
    images: list[Image.Image] = []
    for file in files:
        image = open_picture(file, size)
        held = 4 * len(files) * len(image.getbands()) * image.width * image.height
        if not images and held > MOST_HELD:
            raise DataError(
                f"{len(files)} images of {image.width}x{image.height} pixels take {held >> 30} GiB; draw fewer "
                "(--clean-images, clean_images=), or give the size that the network takes (--image-size, image_size=)"
            )
        images.append(image)
    sizes = [f"{width}x{height}" for width, height in sorted({image.size for image in images})]
    if len(sizes) > 1:
        raise DataError(
            f"the images in {folder} have different sizes (width x height: {sizes[0]} and {sizes[-1]}); give the size that the "
            "network takes (--image-size, image_size=)"
        )
    # A single channel passes for channels last, too; rounding in a convolution follows the order.
    return as_tensor(images).clone(memory_format=torch.contiguous_format)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or leads to one, and has the name of an image: what is no file may have no end."""
    try:
        return _suffix(entry) in SUFFIXES and entry.is_file()
    except OSError:  # a link that leads to itself
        return False
