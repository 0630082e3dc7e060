"""Parts of activations that stay in the order in memory that convolutions are fastest in: channels last."""

import torch
from torch import Tensor


def select(values: Tensor, axis: int, index: Tensor) -> Tensor:
    """``values.index_select(axis, index)``, channels last where the values are.

    torch gives it in another order, in which every operation with what is channels last takes many times as long. A single
    channel is marked as channels last too.

    Args:
        values: any shape.
        axis: 0 or 1.
        index: int64 (n,).
    """
    if not is_channels_last(values):
        return values.index_select(axis, index)
    return values.permute(0, 2, 3, 1).index_select(3 if axis == 1 else axis, index).permute(0, 3, 1, 2)


def in_order_of(values: Tensor, other: Tensor) -> Tensor:
    """The values, channels last where the other ones, of the same shape, are."""
    return values.contiguous(memory_format=torch.channels_last) if is_channels_last(other) else values


def is_channels_last(values: Tensor) -> bool:
    """Whether these are maps, and channels last."""
    return values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
