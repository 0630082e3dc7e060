"""Numbers of channels, as tensors that operations move as they move the channels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

#: Label of an entry that is zero whatever the image, and of an entry of which no channel is known.
ZERO, UNKNOWN = 0, -1


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a value: for each entry, the number of the channel that it is of.

    ::

        value (2, 3, 8, 8) of a convolution         thin (1, 3, 1, 1): [5, 6, 7]
        value.flatten(1) (2, 192)                   thin (1, 192):     [5, 5, ..., 6, 6, ..., 7, 7]
        F.pad(value, (0, 0, 0, 0, 1, 0))            thin (1, 4, 1, 1): [ZERO, 5, 6, 7]

    Attributes:
        thin: float64 (exact numbers, in the one dtype that every movement takes), of size 1 along each axis on which labels do
            not change.
        shape: of the value.
    """

    thin: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, full: Tensor) -> "Labels":
        """Labels from the label of each entry."""
        thin = full
        for axis in range(full.ndim):
            if thin.shape[axis] > 1:
                first = thin.narrow(axis, 0, 1)
                if thin.stride(axis) == 0 or bool((thin == first).all()):
                    thin = first
        return cls(thin, full.shape)

    @classmethod
    def unknown(cls, shape: torch.Size) -> "Labels":
        """Labels of a value in which no channel is known."""
        return cls(torch.full((1,) * len(shape), float(UNKNOWN), dtype=torch.float64), shape)

    @property
    def full(self) -> Tensor:
        """The label of each entry."""
        return self.thin.expand(self.shape)

    def aligned(self, rank: int) -> Tensor:
        """``thin`` with as many axes, as broadcasting adds them."""
        return self.thin.reshape((1,) * (rank - self.thin.ndim) + tuple(self.thin.shape))

    def along(self, axis: int) -> np.ndarray:
        """The label of each place along an axis, int64; unknown where labels change along another axis."""
        axis %= len(self.shape)
        if self.steady([other for other in range(len(self.shape)) if other != axis]):
            return self.thin.flatten().expand(self.shape[axis]).long().numpy()
        return np.full(self.shape[axis], UNKNOWN)

    def steady(self, axes: Sequence[int]) -> bool:
        """Whether labels do not change along these axes."""
        return all(self.thin.shape[axis] == 1 for axis in axes)


@dataclass(frozen=True, eq=False)
class Block:
    """Labels that one node made.

    ::

        node add(a, b), a: [5, 6], b: [8, 9]     start 12, size 2: labels 12 and 13
                                                 parents ([5, 6], [8, 9]): 12 is made of 5 and 8, 13 of 6 and 9

    Attributes:
        node: of the graph.
        start: the first label.
        size: how many.
        parents: for each value that the node read, the label in it that each new label is made of, int64 (size,).
        carriers: those of the parents that the channels come from: of a product with gates what is gated.
    """

    node: fx.Node
    start: int
    size: int
    parents: tuple[np.ndarray, ...] = ()
    carriers: tuple[np.ndarray, ...] = ()

    @property
    def own(self) -> np.ndarray:
        """The labels, int64 (size,)."""
        return np.arange(self.start, self.start + self.size)
