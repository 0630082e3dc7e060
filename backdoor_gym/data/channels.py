"""Images with as many channels as a network takes."""

import torch
from torch import Tensor, nn

from ..errors import DataError
from .datasets import DIGITS, LabelledImages


def fit_channels(network: nn.Module, images: LabelledImages) -> LabelledImages:
    """Images with as many channels as the network takes, where that changes nothing of what they show.

    Grey images get three equal channels for a network of colours; colour images whose channels are equal get one. Images come
    back as they are where the network takes them, or takes neither form.

    Args:
        network: from float32 (n, C, H, W) to anything.
        images: those that it may not take.

    Raises:
        DataError: coloured images for a network of grey ones, or a named data set, whose name says how it is read.
    """
    channels = images.images.shape[1]
    few = torch.cat([images.images[:2]] * 2)[:2]  # some networks cannot take a single one
    if channels not in (1, 3) or _takes(network, few):
        return images
    needed = 4 - channels
    if not _takes(network, few[:, :1].expand(-1, needed, -1, -1)):
        return images
    refusal = f"the network cannot take images of shape {tuple(few.shape[1:])}: it takes"
    if images.source is not None and images.source.dataset != DIGITS:
        name = images.source.dataset
        raise DataError(
            f"{refusal} {'grey' if needed == 1 else 'colour'} ones; say how {name} is read, as in "
            f"{name}{'&' if '?' in name else '?'}channels={needed}"
        )
    grey = images.images[:, :1]
    coloured = int((images.images != grey).flatten(1).any(1).sum())
    if coloured:
        raise DataError(
            f"{refusal} grey ones (one channel), and {coloured} of {len(images)} are coloured; convert them to grey, as PIL's "
            'image.convert("L") does it'
        )
    return LabelledImages(grey.expand(-1, needed, -1, -1).contiguous(), images.labels, images.classes)


def _takes(network: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            network(images.clone().to(next((parameter.device for parameter in network.parameters()), "cpu")))
    except Exception:  # the user's code, which can raise anything
        return False
    return True
