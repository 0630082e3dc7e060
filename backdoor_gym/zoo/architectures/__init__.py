"""Architectures by name, each with a width parameter; images are expected in [0, 1], without normalisation.

``build("resnet18", num_classes=10, in_channels=3, width=64)`` gives a freshly initialised network. The parameter names
of the CIFAR networks are the ones of the checkpoints commonly exchanged for them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...arguments import check_option_kinds
from ...errors import BackdoorGymError, DataError, WeightsError, check_name
from ...wording import shown
from .convnext import convnext, convnext_tiny
from .densenet import densenet, densenet121, densenet161
from .efficientnet import efficientnet_b0, efficientnet_b3
from .imagenet_resnet import resnet18_imagenet, resnet34_imagenet, resnet50_imagenet
from .lenet import lenet
from .mlp import mlp
from .mobilenet_v2 import mobilenet_v2
from .mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from .preact import preact_resnet18
from .resnet import resnet18, resnet34, resnet50
from .small import small_cnn
from .vgg import vgg11, vgg13, vgg16, vgg19, vgg19_bn
from .vit import vit, vit_b_16
from .wide_resnet import wrn16

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        small_cnn, mlp, lenet, resnet18, resnet34, resnet50, resnet18_imagenet, resnet34_imagenet, resnet50_imagenet,
        preact_resnet18, wrn16, vgg11, vgg13, vgg16, vgg19, vgg19_bn, densenet, densenet121, densenet161, mobilenet_v2,
        mobilenet_v3_large, mobilenet_v3_small, efficientnet_b0, efficientnet_b3, convnext, convnext_tiny, vit, vit_b_16,
    )
}  # fmt: skip


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
    check_name("architecture", name, ARCHITECTURES)
    factory = ARCHITECTURES[name]
    known = set(inspect.signature(factory).parameters) - {"num_classes", "in_channels"}
    for option in options:
        check_name(f"option of {name}", option, known)
    check_option_kinds(name, factory, options)
    try:
        return factory(num_classes=num_classes, in_channels=in_channels, **options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, BackdoorGymError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} cannot be built with {shown(num_classes)} classes and the options {shown(options)}: {reason}"
        ) from error


def build_from_spec(spec: Mapping[str, Any]) -> nn.Module:
    """The network that ``{"name": ..., "num_classes": ..., "in_channels": ..., ...options}`` describes.

    Raises:
        WeightsError: the description is incomplete.
    """
    for key in ("name", "num_classes", "in_channels"):
        if key not in spec:
            raise WeightsError(f"the description of the architecture lacks {key}: {shown(dict(spec))}")
    return build(**spec)
