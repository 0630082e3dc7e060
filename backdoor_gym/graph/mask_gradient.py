"""Derivatives by every neuron's mask: to first order, what pruning each of them would change, in one backward pass."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..pruning.neurons import Neurons
from ..pruning.reversing import by_autograd


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
    masks = [kept[layer.neurons] for layer in neurons.layers]
    return by_autograd(neurons.graph, images, masks, [layer.size for layer in neurons.layers], quantity)
