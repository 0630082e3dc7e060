"""What an attacker who knows CLP adds to the loss: outliers of UCLC cost.

CLP prunes the neurons of a layer whose UCLC is more than u standard deviations above the layer's mean. The penalty is
mean over layers of sum_k max(0, b_k - (mean + margin * std)) / mean, with the bounds b_k of ``uclc.py``; mean and standard
deviation are taken as they are, so only what stands out is pulled back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..neurons.finding import find_neurons
from .uclc import bounds


@dataclass(frozen=True)
class UCLCPenalty:
    """Makes the penalty of a network: ``infect(..., penalty=UCLCPenalty())``.

    Attributes:
        weight: of the penalty beside the cross-entropy.
        margin: standard deviations above the layer's mean from where a neuron costs; below the threshold of CLP, so that
            a stricter defender finds nothing either.
    """

    weight: float = 0.3
    margin: float = 1.5

    def __call__(self, network: nn.Module) -> Callable[[], Tensor]:
        """A function that gives the penalty of the network as it then is, a scalar with a gradient.

        Raises:
            UntraceableError: the network's neurons cannot be found.
        """
        neurons = find_neurons(network)

        def penalty() -> Tensor:
            return self.weight * torch.stack([self._excess(layer) for layer in bounds(network, neurons)]).mean()

        return penalty

    def _excess(self, layer: Tensor) -> Tensor:
        mean, deviation = layer.detach().mean(), layer.detach().std(correction=0)
        return (layer - mean - self.margin * deviation).clamp(min=0).sum() / mean.clamp(
            min=torch.finfo(mean.dtype).tiny
        )
