"""Names of torchvision.transforms.functional: timm makes tables of the modes as it is imported."""

from enum import Enum


class InterpolationMode(Enum):
    """How images are resized."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
