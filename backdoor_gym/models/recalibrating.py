"""BN statistics of clean images instead of those of training."""

import torch
from torch import Tensor, nn

#: Images at a time.
BATCH_SIZE = 500


@torch.no_grad()
def recalibrate(network: nn.Module, images: Tensor) -> None:
    """Replace the running statistics of every batch normalisation by those of these images, in place.

    An attacker who does so with clean images leaves nothing of the poisoned training in them. Statistics are plain means over
    batches. The network ends in eval mode.

    Args:
        network: where its parameters are, it computes.
        images: float32 (n, C, H, W) in [0, 1].
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    parameter = next(network.parameters())
    network.eval()  # dropout stays off
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in images.split(BATCH_SIZE):
        network(batch.to(parameter.device, copy=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
