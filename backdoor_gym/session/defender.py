"""What a defender holds: the network and a few clean images, neither trigger nor target nor test images."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..neurons.layers import Neurons


class Memory:
    """What took long to learn of a network, kept for the next policy that would learn the same.

    Attributes:
        spared: seconds that recalled learnings took when they were made, all together.
    """

    def __init__(self) -> None:
        self.spared = 0.0
        self._learned: dict[Hashable, tuple[Any, float]] = {}
        self._lock = RLock()

    def recall(self, key: Hashable, learn: Callable[[], Any]) -> Any:
        """What was learned under that key, which names the way of learning with all its settings; learned now if it never was."""
        with self._lock:
            if key in self._learned:
                learned, seconds = self._learned[key]
                self.spared += seconds
                return learned
            start = time.perf_counter()
            learned = learn()
            self._learned[key] = learned, time.perf_counter() - start
            return learned


@dataclass(frozen=True)
class Defender:
    """What a pruning rule may look at.

    Attributes:
        network: as it was given; not to be changed.
        neurons: of the network.
        units: indices of the neurons that are pruned at a time, one array each.
        images: clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
        memory: of what rules learned of this network with these images.
    """

    network: nn.Module
    neurons: Neurons
    units: Sequence[np.ndarray]
    images: Tensor
    labels: Tensor
    memory: Memory = field(default_factory=Memory, compare=False, repr=False)
