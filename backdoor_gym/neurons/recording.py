"""What a network's forward does, recorded while it runs on real images: every call of a function of PyTorch, in order.

A forward is run, not read, so that it may be written in any way: modules made inside, functions instead of modules, numbers
asked of shapes, loops, einops. What is refused is what would make the record wrong for other images: Python code that reads
the values of tensors that come from the images.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import UntraceableError
from ..networks.adapting import pick_logits
from ..networks.preprocessing import Preprocess, own_module


@dataclass(frozen=True)
class Ref:
    """The value of a recorded call, or one of its parts; the images are call -1."""

    call: int
    part: int | None = None


@dataclass(frozen=True)
class Named:
    """A parameter or buffer of the network."""

    name: str


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that no recorded call gave."""

    tensor: Tensor


@dataclass
class Call:
    """One call.

    Attributes:
        op: "call_function", "call_method" or "call_module", as in torch.fx.
        target: the function, or the name of the method or module.
        args: with ``Ref``, ``Named`` and ``Value`` for tensors.
        kwargs: likewise.
        result: what it gave.
        of_images: whether that depends on the images.
        where: the module that called it.
        shapes: of the tensors that it gave, as they were then: some networks free their memory afterwards.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    of_images: bool
    where: str
    shapes: list[torch.Size | None] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = [part.shape if isinstance(part, Tensor) else None for part in _parts(self.result)]


@dataclass
class Tape:
    """The calls of one pass on images of a shape, and what it ended in: ``Ref`` of the logits."""

    shape: torch.Size
    calls: list[Call] = field(default_factory=list)
    output: Any = None


#: Calls that tell something of a tensor which is no value of it.
_QUERIES = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr", "get_device",
    "__len__", "__hash__", "__repr__", "__format__", "type", "untyped_storage", "storage", "register_hook", "requires_grad_",
    "__dir__", "has_names", "is_same_size", "can_cast", "result_type", "broadcast_shapes", "retain_grad", "__deepcopy__",
})  # fmt: skip
#: Those that tell its size, and operations whose result is as large as values decide.
_SIZES = frozenset({"size", "numel", "nelement", "__len__", "shape"})
_BY_VALUES = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nonzero_static"})
#: Attributes that give another tensor; all others are queries.
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
#: Operators, by what their methods are called without underscores.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "div": operator.truediv,
    "true_divide": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow,
    "matmul": operator.matmul, "neg": operator.neg, "getitem": operator.getitem,
}  # fmt: skip
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


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


class Recorder(TorchFunctionMode):
    """Records one pass of a network.

    Args:
        network: a copy of the user's, in eval mode; ``watched`` prepares it.
        images: float32 (n, C, H, W).

    Attributes:
        tape: the calls.
        path: the modules that are being called, the innermost last.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.tape = Tape(images.shape)
        self.path: list[str] = []
        self._names = {
            id(value): name for name, value in reversed(named_tensors(network).items())
        }  # the first one of several
        self._refs: dict[int, Ref] = {id(images): Ref(-1)}
        #: Tensors whose size hangs on the values of others.
        self._sized: set[int] = set()
        #: Tensors by the memory that they share, and those that another one has been written over.
        self._memory: dict[int, list[int]] = {}
        self._overwritten: set[int] = set()
        self._alive: list[Any] = [images]  # so that no id is given twice
        self._paused = False

    def run(self, network: nn.Module, images: Tensor, entry: str | int | None = None) -> Tape:
        """Record the pass; ``entry`` is where the logits are in the answer, None where it is a tensor (``find_logits``).

        Raises:
            UntraceableError: something in it cannot be recorded; the message names the module.
        """
        with torch.no_grad(), self._watching(network), torch.compiler.set_stance("force_eager"), self:
            output = network(images)
            output = output if entry is None else pick_logits(output, entry)
        self.tape.output = self._refer(output)
        if not isinstance(self.tape.output, Ref):
            raise UntraceableError(
                f"{type(own_module(network)).__name__} must give one tensor of logits computed from the images by "
                f"operations of PyTorch, not {type(output).__name__}"
            )
        return self.tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            bound = _SIGNATURE.bind(*args, **kwargs)
            bound.apply_defaults()
            if _is_plain(bound.arguments):
                with self:
                    return _attention(bound.arguments)
        name = _name(func)
        if self._sized and args and id(args[0]) in self._sized and name in _SIZES:
            raise self._reads_values(f"{name.strip('_')} of a selection by values")
        asks = (name.startswith("is_") and name != "is_nonzero") or name in _QUERIES
        if asks or (_is_attribute(func) and name not in _TENSOR_ATTRIBUTES):
            return func(*args, **kwargs)
        described = fx.node.map_aggregate((args, kwargs), self._refer)
        version = args[0]._version if args and isinstance(args[0], Tensor) else 0
        inplace = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        shape = args[0].shape if args and isinstance(args[0], Tensor) else ()
        result = func(*args, **kwargs)
        same = bool(args) and result is args[0]
        if same and args[0]._version == version:
            return result  # nothing happened, as of dropout in eval mode
        if name == "__setitem__":
            result, same = args[0], True
        of_images = self._of_images(described)
        if not any(isinstance(part, Tensor) for part in _parts(result)):
            if of_images and result is not None:
                raise self._reads_values(name.strip("_"))
            return None if name == "__setitem__" else result
        self._watch_memory(name, args, result, same, of_images)
        op, target, described_args, described_kwargs = _canonical(func, name, *described, bool(inplace), shape)
        self._record(Call(op, target, described_args, described_kwargs, result, of_images, self._here))
        return None if name == "__setitem__" else result

    def _reads_values(self, how: str) -> UntraceableError:
        return UntraceableError(
            f"{self.where} reads the values of tensors ({how}), so that other images may take another way; its forward must not "
            "branch or loop on the values of tensors: move such code out of the network"
        )

    def _watch_memory(self, name: str, args: tuple[Any, ...], result: Any, same: bool, of_images: bool) -> None:
        """Note which tensors are of a size that values decide, and which have been written over through another one."""
        given = [one for one in pytree.tree_leaves(args) if isinstance(one, Tensor)]
        for one in given:
            if id(one) in self._overwritten:
                raise UntraceableError(
                    f"{self.where} writes into a tensor and reads it through another view of its memory; write "
                    "y = y.relu() or torch.cat instead of an operation in place on a part of y"
                )
        by_values = name in _BY_VALUES or (name == "where" and len(args) == 1)
        by_values |= name == "__getitem__" and any(one.dtype in (torch.bool, torch.uint8) for one in given[1:])
        for part in _parts(result):
            if not isinstance(part, Tensor):
                continue
            shapes = {one.shape for one in given if id(one) not in self._sized}
            if of_images and (by_values or (any(id(one) in self._sized for one in given) and part.shape not in shapes)):
                self._sized.add(id(part))
            if part.numel() and part.layout is torch.strided:
                memory = self._memory.setdefault(part.untyped_storage().data_ptr(), [])
                if same:
                    self._overwritten |= {one for one in memory if one != id(part)}
                memory.append(id(part))

    @property
    def _here(self) -> str:
        return self.path[-1] if self.path else ""

    @property
    def where(self) -> str:
        """The module that is being called, in words."""
        return f"layer {self._here}" if self._here else "the network's own forward"

    def _record(self, call: Call) -> None:
        index = len(self.tape.calls)
        self.tape.calls.append(call)
        self._alive.append(call.result)
        if isinstance(call.result, Tensor):
            self._refs[id(call.result)] = Ref(index)
            return
        for place, part in enumerate(_parts(call.result)):
            if isinstance(part, Tensor):
                self._refs[id(part)] = Ref(index, place)

    def _refer(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._refs:
            return self._refs[id(value)]
        if id(value) in self._names:
            return Named(self._names[id(value)])
        self._alive.append(value)
        return Value(value)

    def _of_images(self, described: Any) -> bool:
        found = False

        def look(value: Any) -> Any:
            nonlocal found
            if isinstance(value, Ref):
                found |= value.call < 0 or self.tape.calls[value.call].of_images
            return value

        fx.node.map_aggregate(described, look)
        return found

    @contextmanager
    def _watching(self, network: nn.Module) -> Iterator[None]:
        """Know which module is called; what stands in front of the network is one call."""
        handles, in_front = [], []
        for name, module in network.named_modules():
            if isinstance(module, Preprocess):
                in_front.append(module)
                module.forward = self._whole(name, module)  # type: ignore[assignment, method-assign]
            elif name:
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.path.append(name)))
                handles.append(module.register_forward_hook(lambda *_: self.path.pop() and None))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in in_front:
                del module.forward

    def _whole(self, name: str, module: Preprocess) -> Callable[[Tensor], Tensor]:
        forward = module.forward

        def call(images: Tensor) -> Tensor:
            self._paused = True
            try:
                result = forward(images)
            finally:
                self._paused = False
            self._record(Call("call_module", name, (self._refer(images),), {}, result, True, name))
            return result

        return call


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network, shared ones under each of their names."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def _name(func: Any) -> str:
    if _is_attribute(func):
        return func.__self__.__name__
    return getattr(func, "__name__", str(func))


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")


def _parts(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _canonical(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inplace: bool, shape: tuple[int, ...]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """The call as torch.fx writes it, with one way of writing for what has several, and nothing in place."""
    if name == "__setitem__":
        return "call_function", set_items, args, kwargs
    if _is_attribute(func):
        return "call_function", getattr, (*args[:1], name), {}
    if "inplace" in kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    is_method = hasattr(Tensor, name) and getattr(func, "__module__", None) in (None, "torch._tensor")
    bare = name.strip("_")
    if is_method and name.startswith("__r") and bare[1:] in _OPERATORS and len(args) == 2 and not kwargs:
        return "call_function", _OPERATORS[bare[1:]], args[::-1], {}
    if is_method and name.startswith("__i") and bare[1:] in _OPERATORS and len(args) == 2:
        return "call_function", _OPERATORS[bare[1:]], args, {}
    if is_method and bare in _OPERATORS and len(args) == (1 if bare == "neg" else 2) and not kwargs:
        return "call_function", _OPERATORS[bare], args, {}
    if inplace and name.endswith("_"):
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
    if name in ("view", "view_as") and not (len(args) == 2 and isinstance(args[1], torch.dtype)):
        name = {"view": "reshape", "view_as": "reshape_as"}[name]  # a view needs one order in memory
    return "call_method", name, args, kwargs


def _is_plain(arguments: Mapping[str, Any]) -> bool:
    """Whether attention is that of one sequence with itself, with nothing added and nothing masked."""
    added = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")
    return (
        arguments["query"] is arguments["key"] is arguments["value"]
        and arguments["in_proj_weight"] is not None
        and not arguments["add_zero_attn"]
        and all(arguments[name] is None for name in added)
    )


def _attention(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
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
