"""Architectures by name, each with a width parameter; images are expected in [0, 1], without normalisation.

``build("resnet18", num_classes=10, in_channels=3, width=64)`` gives a freshly initialised network. The parameter names
of the CIFAR networks are the ones of the checkpoints commonly exchanged for them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...errors import UnknownNameError, WeightsError
from .preact import preact_resnet18
from .resnet import resnet18
from .small import small_cnn
from .vgg import vgg16
from .wide_resnet import wrn16

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "vgg16": vgg16,
    "wrn16": wrn16,
}


def build(name: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: one of ``ARCHITECTURES``.
        num_classes: number of logits.
        in_channels: channels of the images.
        **options: options of that architecture (``width`` for all of them).

    Raises:
        UnknownNameError: no such architecture, or an option it does not have.
    """
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    factory = ARCHITECTURES[name]
    known = set(inspect.signature(factory).parameters) - {"num_classes", "in_channels"}
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of {name}", option, known)
    return factory(num_classes=num_classes, in_channels=in_channels, **options)


def build_from_spec(spec: Mapping[str, Any]) -> nn.Module:
    """The network that ``{"name": ..., "num_classes": ..., "in_channels": ..., ...options}`` describes."""
    try:
        return build(**spec)
    except TypeError as error:
        raise WeightsError(f"the description of the architecture is not usable: {dict(spec)!r} ({error})") from error
