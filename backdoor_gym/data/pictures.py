"""PIL images: those of kinds and sizes that are read, and their pixels as tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError

#: Names of files that are taken for images, and Pillow's names of their formats: others may start another program.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Pixels a side that images have, or are resized to; pixels of an image that is resized.
MOST_SIDE, MOST_PIXELS = 1024, 1 << 26
#: Modes of PIL that have no colour.
GREY = ("1", "L", "LA")


def open_picture(file: Path, size: tuple[int, int] | None) -> Image.Image:
    """The image in a file, as ``plain`` returns it.

    Raises:
        DataError: no image, one of more than one picture, or one that its header says is too large: it is not unpacked.
    """
    try:
        with Image.open(file, "r", FORMATS) as image:
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
            return plain(image, size)
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise DataError(f"{file} cannot be read as an image: {error}") from error


def plain(image: Image.Image, size: tuple[int, int] | None = None, grey: bool | None = None) -> Image.Image:
    """The image with one channel ("L") or three ("RGB") of 8 bits.

    Args:
        image: of any mode.
        size: height and width that it is resized to, bilinear and smoothed where it shrinks.
        grey: whether it has one channel; by default where its mode has no colour.

    Raises:
        DataError: more than 8 bits a channel.
        Exception: whatever a damaged image makes its readers raise.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(f"mode {image.mode}: only images of 8 bits a channel are read")
    image = image.convert("L" if (image.mode in GREY if grey is None else grey) else "RGB")
    return image if size is None else image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """float32 (n, C, H, W) in [0, 1] of ``plain`` images of one size: grey if all of them are, and RGB otherwise."""
    grey = all(image.mode == "L" for image in images)
    pixels = torch.from_numpy(np.stack([np.asarray(image if grey else image.convert("RGB")) for image in images]))
    channels_last = pixels[..., None] if grey else pixels
    return channels_last.permute(0, 3, 1, 2).contiguous().float().div_(255)
