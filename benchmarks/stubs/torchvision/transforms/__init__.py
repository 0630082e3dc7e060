"""Names of torchvision.transforms: timm derives classes from these two."""

from backdoor_gym import Unused, functional
from backdoor_gym.functional import InterpolationMode

__all__ = ["InterpolationMode", "PILToTensor", "ToTensor", "functional"]


class ToTensor(Unused):
    """A base class of timm's."""


class PILToTensor(Unused):
    """A base class of timm's."""
