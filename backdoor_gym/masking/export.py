"""Masks made permanent: zeros written into the weights."""

from operator import attrgetter

import numpy as np
import torch
from torch import nn

from ..neurons.copying import plain_copy
from ..neurons.layers import Neurons


def write_mask(network: nn.Module, neurons: Neurons, mask: np.ndarray, inplace: bool = False) -> nn.Module:
    """The network with the pruned neurons' weights and biases (of the BN where there is one) set to zero.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        mask: bool (neurons,), True where kept.
        inplace: whether to change the network itself instead of a copy.

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
    return network
