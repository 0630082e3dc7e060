"""Mild shifts of a defender's images, as happen on the way from one camera and one file to another."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import LabelledImages
from ..errors import UnknownNameError
from .infected import InfectedModel

CORRUPTIONS = ("none", "jpeg", "brightness")


def corrupt(images: Tensor, kind: str, level: float) -> Tensor:
    """Images, float32 (n, C, H, W) in [0, 1], after a corruption.

    Args:
        images: one or three channels.
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


def corrupted(model: InfectedModel, kind: str, level: float) -> InfectedModel:
    """The model with the defender's clean images after a corruption; its test images stay as they are."""
    if kind == "none":
        return model
    clean = LabelledImages(corrupt(model.clean.images, kind, level), model.clean.labels)
    facts = {**model.facts, "corruption": kind, "corruption_level": level}
    return InfectedModel(
        model.network, clean, model.test, model.trigger, model.target, model.architecture, facts, model.name
    )


def draw_corruption(random: np.random.Generator) -> dict[str, Any]:
    """No corruption in half of the cases, else JPEG of quality 50 to 95 or a brightness changed by up to 0.05."""
    kind = str(random.choice(CORRUPTIONS, p=[0.5, 0.25, 0.25]))
    level = {"none": 0.0, "jpeg": float(random.integers(50, 96)), "brightness": round(random.uniform(-0.05, 0.05), 3)}
    return {"kind": kind, "level": level[kind]}


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    read = np.array(Image.open(buffer), dtype=np.float32) / 255
    return torch.from_numpy(read).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()
