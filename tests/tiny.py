"""Every architecture as small as it gets, for one-channel images of 8x8 pixels."""

import torch
from torch import Tensor, nn

from backdoor_gym.networks import ARCHITECTURES, build

from .conftest import settle

_SMALL_IMAGES = {
    "mlp": {"image_size": 8},
    "lenet": {"image_size": 8},
    "vgg19_bn": {"hidden": 16, "halvings": 2},
    "densenet": {"layers": 3},
    "convnext_tiny": {"patch": 1},
    "vit": {"image_size": 8, "patch": 2, "heads": 2, "depth": 2},
    "vit_b_16": {"image_size": 8, "patch": 2},
}
_HALVED = (
    "resnet18_imagenet", "resnet34_imagenet", "resnet50_imagenet", "vgg11", "vgg13", "vgg16", "vgg19", "densenet121",
    "densenet161", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_b3",
)  # fmt: skip
OPTIONS = {
    name: {"width": 8, **({"halvings": 2} if name in _HALVED else _SMALL_IMAGES.get(name, {}))}
    for name in ARCHITECTURES
}
#: Those that take long and have the layers of another one.
LARGE = ("densenet161", "efficientnet_b3", "resnet50_imagenet", "resnet34_imagenet")
#: Name and further options of those that are tested, with VGG without batch normalisation beside them.
CASES = [(name, {}) for name in ARCHITECTURES if name not in LARGE] + [("vgg11", {"batch_norm": False})]


def tiny(name: str, **options) -> nn.Module:
    """A small network that looks trained: normalisations, scales by channel and tokens have random weights."""
    torch.manual_seed(0)
    network = settle(build(name, 10, 1, **OPTIONS[name], **options))
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    for name, parameter in network.named_parameters():
        if name.endswith(("layer_scale", "class_token")):
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator))
    return network


def tiny_images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
