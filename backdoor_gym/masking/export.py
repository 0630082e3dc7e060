"""Masks made permanent: zeros, or constants, written into the weights."""

from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, nn

from ..neurons.copying import plain_copy
from ..neurons.layers import Neurons


def write_mask(
    network: nn.Module, neurons: Neurons, mask: np.ndarray, inplace: bool = False, fill: Tensor | None = None
) -> nn.Module:
    """The network with the pruned neurons' weights (of the BN where there is one) set to zero, and biases to their constants.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        mask: bool (neurons,), True where kept.
        inplace: whether to change the network itself instead of a copy.
        fill: what each pruned neuron gives (``fill.fill_values``), float32 (neurons,); None for zeros.

    Returns:
        A network of the same class, with the same names and shapes in its state dict.
    """
    network = network if inplace else plain_copy(network)
    with torch.no_grad():
        for layer in neurons.layers:
            pruned = ~mask[layer.neurons]
            for part in layer.parts:
                rows = part.rows(pruned)
                for name, first in (*part.weights, *part.biases):
                    parameter = attrgetter(name)(network)
                    here = torch.from_numpy(rows[first : first + len(parameter)])
                    parameter[here.to(parameter.device)] = 0
                    if fill is not None and (name, first) in part.biases:
                        constants = part.by_row(fill[layer.neurons].cpu(), 0.0)[first : first + len(parameter)]
                        parameter[here.to(parameter.device)] = constants[here].to(parameter)
    return network
