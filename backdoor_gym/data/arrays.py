"""Tensors and arrays of anybody's making as images and labels, where there is no doubt what is meant."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files.plain import check_plain

#: How far rounding may take floats out of [0, 1].
ROUNDING = 1e-5


def as_images(images: Any) -> Tensor:
    """Images as float32 (n, C, H, W).

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
    """Labels as int64 (n,).

    Args:
        labels: integers (n,) or (n, 1), or one-hot rows (n, classes), as a tensor, an array or a list.

    Raises:
        DataError: anything else.
    """
    check_plain("labels", labels, "integers (n,)")
    try:
        numbers = labels.detach().cpu() if isinstance(labels, Tensor) else np.asarray(labels)
        if isinstance(numbers, np.ndarray):
            check_plain("labels", numbers, "integers (n,)")
            dtype = np.int64 if np.issubdtype(numbers.dtype, np.integer) else numbers.dtype
            numbers = torch.from_numpy(np.require(numbers, dtype, ["C", "W"]))
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"labels must be integers (n,), not a {type(labels).__name__} of something else") from None
    if numbers.ndim == 2 and numbers.shape[1] > 1 and _is_one_hot(numbers):
        return numbers.argmax(1)
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        kind = str(numbers.dtype).removeprefix("torch.")
        raise DataError(f"labels must be integers (n,), or one-hot (n, classes), not {kind} {tuple(numbers.shape)}")
    return numbers.long()


def _is_one_hot(rows: Tensor) -> bool:
    return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())
