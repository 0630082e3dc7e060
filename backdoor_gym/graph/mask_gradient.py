"""Derivatives by every neuron's mask: to first order, what pruning each of them would change, in one backward pass."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..pruning.neurons import Neurons


def mask_gradient(
    neurons: Neurons, images: Tensor, quantity: Callable[[Tensor], Tensor], mask: np.ndarray | None = None
) -> Tensor:
    """Derivative of a quantity of the logits by each neuron's mask, float32 (neurons,), zeros where it has no part.

    Args:
        neurons: of the network.
        images: float32 (n, C, H, W) in [0, 1].
        quantity: from logits (n, classes) to a scalar.
        mask: where the derivative is taken, bool (neurons,), True where kept; None for the whole network.
    """
    kept = torch.ones(len(neurons)) if mask is None else torch.from_numpy(mask).float()
    kept = kept.to(images.device)
    masks = [kept[layer.neurons].clone().requires_grad_() for layer in neurons.layers]
    with torch.enable_grad():
        gradients = torch.autograd.grad(quantity(neurons.graph(images, *masks)), masks, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(one) if gradient is None else gradient
            for one, gradient in zip(masks, gradients, strict=True)
        ]
    )
