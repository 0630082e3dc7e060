"""What a defender holds: the network and a few clean images, neither trigger nor target nor test images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..pruning.neurons import Neurons


@dataclass(frozen=True)
class Defender:
    """What a pruning rule may look at.

    Attributes:
        network: as it was given; not to be changed.
        neurons: of the network.
        units: indices of the neurons that are pruned at a time, one array each.
        images: clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """

    network: nn.Module
    neurons: Neurons
    units: Sequence[np.ndarray]
    images: Tensor
    labels: Tensor
