"""Names of torchvision.transforms: timm derives classes from these two."""

from .. import Unused
from . import functional
from .functional import InterpolationMode

__all__ = ["InterpolationMode", "PILToTensor", "ToTensor", "functional"]


class ToTensor(Unused):
    """A base class of timm's."""


class PILToTensor(Unused):
    """A base class of timm's."""
