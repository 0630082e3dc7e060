"""Calls of PyTorch as torch.fx writes them: one way of writing for what has several, and nothing in place."""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Operators, by what their methods are called without underscores.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "div": operator.truediv,
    "true_divide": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow,
    "matmul": operator.matmul, "neg": operator.neg, "getitem": operator.getitem,
}  # fmt: skip
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
#: What attention may add or leave out, each None where it does not.
_ATTENTION_EXTRAS = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")


def set_items(values: Tensor, index: Any, items: Any) -> Tensor:
    """A copy of the values with some of them replaced: ``values[index] = items``."""
    values = values.clone()
    values[index] = items
    return values


def changed(values: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """A copy of the values, changed by a method that works in place."""
    values = values.clone()
    getattr(values, method)(*args, **kwargs)
    return values


def is_attribute(func: Any) -> bool:
    """Whether the function reads or sets an attribute of a tensor."""
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")


def name_of(func: Any) -> str:
    """The name of a function, method or attribute."""
    return func.__self__.__name__ if is_attribute(func) else getattr(func, "__name__", str(func))


def canonical(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """A call as op, target, arguments and options of a node; ``shape`` is that of the first argument before the call."""
    name = name_of(func)
    if name == "__setitem__":
        return "call_function", set_items, args, kwargs
    if is_attribute(func):
        return "call_function", getattr, (*args[:1], name), {}
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    is_method = hasattr(Tensor, name) and getattr(func, "__module__", None) in (None, "torch._tensor")
    bare = name.strip("_")
    if is_method and not kwargs:
        reflected_or_inplace = name.startswith(("__r", "__i"))
        function = _OPERATORS.get(bare) or (_OPERATORS.get(bare[1:]) if reflected_or_inplace else None)
        if function and len(args) == (1 if function is operator.neg else 2):
            return "call_function", function, args[::-1] if name.startswith("__r") else args, {}
    if name.endswith("_") and not name.endswith("__"):
        plain = name[:-1]
        if is_method and not hasattr(Tensor, plain):
            return "call_function", changed, (args[0], name, *args[1:]), kwargs
        if is_method:
            name = plain
        else:
            func = getattr(F if hasattr(F, plain) and not hasattr(torch, plain) else torch, plain, func)
    if bare == "squeeze" and len(args) == 1 and not kwargs:  # of one image it would take the batch away
        args = (*args, tuple(axis for axis, size in enumerate(shape) if size == 1))
    if not is_method:
        return "call_function", func, args, kwargs
    if name == "type" and len(args) == 2 and isinstance(args[1], torch.dtype):
        name = "to"
    if name in ("view", "view_as") and not (len(args) == 2 and isinstance(args[1], torch.dtype)):
        name = name.replace("view", "reshape")  # a view needs one order in memory
    return "call_method", name, args, kwargs


def self_attention_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any] | None:
    """Arguments of ``F.multi_head_attention_forward`` by name, None unless one sequence attends to itself, nothing masked."""
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    plain = (
        arguments["query"] is arguments["key"] is arguments["value"]
        and arguments["in_proj_weight"] is not None
        and not arguments["add_zero_attn"]
        and all(arguments[name] is None for name in _ATTENTION_EXTRAS)
    )
    return arguments if plain else None


def self_attention(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` in steps that are recorded one by one."""
    query, heads = arguments["query"], arguments["num_heads"]
    batched = query if query.dim() == 3 else query.unsqueeze(1)
    length, count, width = batched.shape
    projected = F.linear(batched, arguments["in_proj_weight"], arguments["in_proj_bias"])
    q, k, v = projected.reshape(length, count, 3, heads, width // heads).permute(2, 1, 3, 0, 4).unbind(0)
    joined = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(length, count, width)
    out = F.linear(joined, arguments["out_proj_weight"], arguments["out_proj_bias"])
    weights = None
    if arguments["need_weights"]:
        weights = (q @ k.transpose(-2, -1) / (width // heads) ** 0.5).softmax(-1)
        weights = weights.mean(1) if arguments["average_attn_weights"] else weights
    return (out if query.dim() == 3 else out.squeeze(1)), weights
