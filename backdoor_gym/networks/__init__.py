"""Architectures by name, each with a width; images are expected in [0, 1], without normalisation.

Parameters have the names of the checkpoints commonly exchanged for each.

    build("resnet18", num_classes=10, in_channels=3, width=64)
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..arguments import check_option_kinds
from ..errors import BackdoorGymError, DataError, WeightsError, check_name
from ..wording import shown
from . import convnext, densenet, efficientnet, mobilenet_v3, resnet, vgg, vit
from .cnn import CNN
from .lenet import LeNet
from .mlp import MLP
from .mobilenet_v2 import MobileNetV2
from .preact import PreActResNet18, WideResNet16
from .small import SmallCNN

#: A class or function that takes ``num_classes``, ``in_channels`` and its options, ``width`` among them.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "cnn": CNN,
    "mlp": MLP,
    "lenet": LeNet,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet18_imagenet": resnet.resnet18_imagenet,
    "resnet34_imagenet": resnet.resnet34_imagenet,
    "resnet50_imagenet": resnet.resnet50_imagenet,
    "preact_resnet18": PreActResNet18,
    "wrn16": WideResNet16,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "vgg19_bn": vgg.vgg19_bn,
    "densenet": densenet.densenet,
    "densenet121": densenet.densenet121,
    "densenet161": densenet.densenet161,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": mobilenet_v3.mobilenet_v3_large,
    "mobilenet_v3_small": mobilenet_v3.mobilenet_v3_small,
    "efficientnet_b0": efficientnet.efficientnet_b0,
    "efficientnet_b3": efficientnet.efficientnet_b3,
    "convnext": convnext.convnext,
    "convnext_tiny": convnext.convnext_tiny,
    "vit": vit.VisionTransformer,
    "vit_b_16": vit.vit_b_16,
}


def build(name: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """A freshly initialised network of ``ARCHITECTURES``.

    Raises:
        UnknownNameError: no such architecture, or an option it does not have.
        DataError: options of which no network can be made.
    """
    check_name("architecture", name, ARCHITECTURES)
    factory = ARCHITECTURES[name]
    for option in options:
        check_name(
            f"option of {name}", option, inspect.signature(factory).parameters.keys() - {"num_classes", "in_channels"}
        )
    check_option_kinds(name, factory, options)
    try:
        return factory(num_classes=num_classes, in_channels=in_channels, **options)
    except BackdoorGymError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
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
