"""Derivatives by every neuron's mask: to first order, what pruning each of them would change, in one backward pass."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..masking.backward import by_autograd, by_logits
from ..masking.sizes import Sizes
from ..neurons.channels import filled
from ..neurons.layers import Neurons


def mask_gradient(
    neurons: Neurons,
    images: Tensor,
    quantity: Callable[[Tensor], Tensor],
    mask: np.ndarray | None = None,
    fill: Tensor | None = None,
) -> Tensor:
    """Derivative of a quantity of the logits by each neuron's mask, float32 (neurons,), zeros where it has no part.

    Args:
        neurons: of the network.
        images: float32 (n, C, H, W) in [0, 1].
        quantity: from logits (n, classes) to a scalar.
        mask: where the derivative is taken, bool (neurons,), True where kept; None for the whole network.
        fill: what each neuron gives where it is pruned, float32 (neurons,); None for zeros. The derivative is then, to first
            order, what replacing the neuron's values by this constant takes away.
    """
    kept = torch.ones(len(neurons)) if mask is None else torch.from_numpy(mask).float()
    kept = kept.to(images.device)
    masks = filled([kept[layer.neurons] for layer in neurons.layers], neurons.layer_fills(fill, images.device))
    sizes = [layer.size for layer in neurons.layers]
    at_once = Sizes(neurons.graph, images[:1]).images_at_once
    if len(images) <= at_once:
        return by_autograd(neurons.graph, images, masks, sizes, quantity)
    batches = images.split(at_once)
    with torch.no_grad():
        logits = torch.cat([neurons.graph(batch, *masks) for batch in batches])
    gradients = by_logits(quantity, logits).split(at_once)
    total = torch.zeros(len(neurons), device=images.device)
    for batch, gradient in zip(batches, gradients, strict=True):

        def share(logits: Tensor, gradient: Tensor = gradient) -> Tensor:
            return (logits * gradient).sum()

        total += by_autograd(neurons.graph, batch, masks, sizes, share)
    return total
