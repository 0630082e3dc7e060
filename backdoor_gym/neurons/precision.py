"""Forwards that compute in other types than float32, run in float32."""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .canonical import is_attribute

#: Methods that cast to a type other than float32.
CASTS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}
REDUCED = frozenset({torch.float16, torch.bfloat16})
_DEVICES = ("cpu", "cuda")


class InFloat32(TorchFunctionMode):
    """What a network computes in one of some types, by casts of its own or by autocast, is computed in float32.

    Attributes:
        types: those types.
        met: those that the network asked for.
    """

    def __init__(self, types: Collection[torch.dtype] = REDUCED) -> None:
        super().__init__()
        self.types = types
        self.met: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_attribute(func):
            return func(*args, **kwargs)
        cast = next((kind for kind in self.types if func is getattr(Tensor, CASTS[kind])), None)
        if cast is not None:
            self.met.add(cast)
            func = Tensor.float
        if any(_type_of(leaf) in self.types for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = pytree.tree_map(self._in_float32, (args, kwargs))
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    self.met.add(torch.get_autocast_dtype(device))
                    stack.enter_context(torch.autocast(device, enabled=False))
            return func(*args, **kwargs)

    def _in_float32(self, value: Any) -> Any:
        kind = _type_of(value)
        if kind is None or kind not in self.types:
            return value
        self.met.add(kind)
        return value.float() if isinstance(value, Tensor) else torch.float32


def _type_of(value: Any) -> torch.dtype | None:
    """Of a tensor, or the type that an argument names."""
    if isinstance(value, Tensor):
        return value.dtype
    return value if isinstance(value, torch.dtype) else None
