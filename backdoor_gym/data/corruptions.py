"""Mild shifts of images, as happen on the way from one camera and one file to another."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UnknownNameError

CORRUPTIONS = ("none", "jpeg", "brightness")


def corrupt(images: Tensor, kind: str, level: float) -> Tensor:
    """Images after a corruption.

    Args:
        images: float32 (n, C, H, W) in [0, 1], of one or three channels.
        kind: "none", "jpeg" (``level`` is its quality, 1 to 95) or "brightness" (``level`` is added).
        level: how much.

    Raises:
        UnknownNameError: no such corruption.
    """
    if kind == "none":
        return images
    if kind == "brightness":
        return (images + level).clamp(0, 1)
    if kind == "jpeg":
        return torch.stack([_through_jpeg(image, int(level)) for image in images])
    raise UnknownNameError("corruption", kind, CORRUPTIONS)


def draw_corruption(random: np.random.Generator) -> dict[str, Any]:
    """Draw no corruption in half of the cases, else JPEG of quality 50 to 95 or a brightness changed by up to 0.05."""
    kind = str(random.choice(CORRUPTIONS, p=[0.5, 0.25, 0.25]))
    level = {"none": 0.0, "jpeg": float(random.integers(50, 96)), "brightness": round(random.uniform(-0.05, 0.05), 3)}
    return {"kind": kind, "level": level[kind]}


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    read = np.array(Image.open(buffer), dtype=np.float32) / 255
    return torch.from_numpy(read).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()
