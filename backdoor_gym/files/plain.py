"""Tensors and arrays that are plain arrays of numbers, and those that only look like it."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..wording import shown

#: A larger view is not written out: so many times as large as what it is a view of, and so many bytes as float32.
MOST_REPEATED, MOST_SPELLED = 4, 1 << 30


def odd_kind(tensor: Tensor) -> str:
    """The kind of a tensor that is no plain array of numbers, in words; "" for a plain one."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "quantised" if tensor.is_quantized else ""


def check_plain(name: str, value: Any, what: str = "numbers") -> None:
    """Raise ``DataError`` for a tensor or an array that is not of plain numbers, or a view far larger than its memory."""
    if isinstance(value, Tensor):
        if odd := odd_kind(value):
            raise DataError(f"{name} must be a plain tensor, with all its values, not a {odd} one")
        strides, item = value.stride(), value.element_size()
    elif isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise DataError(f"{name} must be an array without a mask: fill what is masked, or leave it out")
        if value.dtype.kind not in "biufc":
            raise DataError(f"{name} must be {what}, not of the type {shown(str(value.dtype))}")
        strides, item = tuple(abs(stride) // value.itemsize for stride in value.strides), value.itemsize
    else:
        return
    count = math.prod(value.shape)
    span = 1 + sum((length - 1) * stride for length, stride in zip(value.shape, strides, strict=True))
    if count > MOST_REPEATED * span and count * max(4, item) > MOST_SPELLED:
        raise DataError(f"{name} are a view {tuple(value.shape)} of {span} numbers; give those that there are")
