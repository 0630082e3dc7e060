"""What ``preprocessor_config.json`` and timm say of images: the size they are brought to, and what is done to their values."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.pictures import MOST_SIDE
from ..errors import DataError
from ..networks.preprocessing import Normalise
from ..wording import shown

PREPROCESSOR = "preprocessor_config.json"


class FlipChannels(nn.Module):
    """RGB to BGR."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1)


def timm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description that timm has of its images, in the words of transformers."""
    described = config.get("pretrained_cfg") or config  # older folders say it right there
    shape = described.get("input_size")
    size = {"height": shape[1], "width": shape[2]} if isinstance(shape, list | tuple) and len(shape) == 3 else None
    return {"size": size, "image_mean": described.get("mean"), "image_std": described.get("std"), "do_normalize": True}


def image_size(settings: Mapping[str, Any] | None, config: Mapping[str, Any], where: Path) -> tuple[int, int] | None:
    """Height and width that images are brought to; None where nothing is said of it.

    Args:
        settings: of the preprocessing, None where there are none.
        config: of the network.
        where: for the message.

    Raises:
        DataError: what is said is not understood.
    """
    settings = settings or {}
    described = settings.get("size", config.get("image_size"))
    if not settings.get("do_resize", True):
        described = config.get("image_size")
    if settings.get("crop_size") and settings.get("do_center_crop", True):
        described = settings["crop_size"]
    if described is None:
        return None
    sides = described if isinstance(described, list | tuple) else [described]
    if isinstance(described, Mapping):
        square = set(described) == {"shortest_edge"}
        sides = [described["shortest_edge"]] if square else [described.get("height"), described.get("width")]
    if len(sides) not in (1, 2) or not all(type(side) is int and 0 < side <= MOST_SIDE for side in sides):
        raise DataError(
            f"the image size in {where} is not understood ({shown(described)}): give it with --image-size (image_size=)"
        )
    return sides[0], sides[-1]


def normalisation(settings: Mapping[str, Any] | None, where: Path) -> nn.Module | None:
    """From images in [0, 1] to what the network takes; None where it takes them as they are.

    Raises:
        DataError: nothing is said of it, or what is said is not understood.
    """
    if settings is None:
        raise DataError(
            f"{where} has no {PREPROCESSOR}, so that it is not known what the network does to images: say it with --mean and "
            "--std (preprocess=)"
        )
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    mean, std = settings.get("image_mean"), settings.get("image_std")
    rescaled = settings.get("do_rescale", True)
    factor = settings.get("rescale_factor", 1 / 255) if rescaled else 1.0
    # MobileViT writes a mean and does not use it.
    normalised = settings.get("do_normalize", mean is not None and "MobileViT" not in kind)
    try:
        scale = 255 * float(factor)
        center, width = (_numbers(mean), _numbers(std)) if normalised else ([0.0] * 3, [1.0] * 3)
        if not all(map(math.isfinite, (scale, *center, *width))):
            raise ValueError("numbers that are not finite")
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"the normalisation in {where} is not understood (rescale_factor {shown(factor)}, image_mean {shown(mean)}, image_std "
            f"{shown(std)}): give it with --mean and --std (preprocess=)"
        ) from error
    if settings.get("do_color_quantize") or scale <= 0:
        raise DataError(f"{where} turns images into something else than scaled ones; say what with preprocess=")
    offset = 1.0 if settings.get("rescale_offset") and rescaled else 0.0
    deviations = width
    center, width = [(offset + value) / scale for value in center], [value / scale for value in width]
    if normalised and settings.get("include_top", "EfficientNet" in kind):  # EfficientNet divides a second time
        width = [value * again for value, again in zip(width, deviations, strict=True)]
    steps: list[nn.Module] = []
    if any(abs(value) > 1e-6 for value in center) or any(abs(value - 1) > 1e-6 for value in width):
        steps.append(Normalise(center, width))
    if settings.get("do_flip_channel_order", "MobileViT" in kind):
        steps.append(FlipChannels())
    return nn.Sequential(*steps) if len(steps) > 1 else next(iter(steps), None)


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3)]


def in_words(preprocess: Any, size: tuple[int, int] | None) -> str:
    """What is done to images because a file says so."""
    words = [] if size is None else [f"resized to {size[0]}x{size[1]} where they come from files"]
    for step in preprocess.modules() if isinstance(preprocess, nn.Module) else ():
        if isinstance(step, Normalise):
            state = {key: ",".join(f"{value:.4g}" for value in values) for key, values in step.state().items()}
            words.append(f"normalised with mean {state['mean']} and std {state['std']}")
        elif isinstance(step, FlipChannels):
            words.append("turned from RGB to BGR")
    return ", ".join(words) or "taken as they are"
