"""What a network's forward does, recorded while it runs on real images: every call of a function of PyTorch, in order.

A forward is run, not read, so that it may be written in any way: modules made inside, functions instead of modules, numbers
asked of shapes, loops, einops. Refused is Python code that reads the values of tensors that come from the images: for other
images the record would be wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import UntraceableError
from ..networks.adapting import pick_logits
from ..networks.preprocessing import Preprocess, own_module, own_name
from .canonical import canonical, is_attribute, name_of, self_attention, self_attention_arguments, set_items
from .precision import InFloat32


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
        where: the module that called it, "" for the network itself.
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
    """The calls of one pass.

    ::

        images                                                    Ref(-1)
        calls[0]  F.conv2d   (Ref(-1), Named("conv.weight"))      Ref(0)
        calls[1]  "chunk"    (Ref(0), 2, 1)                       Ref(1, 0), Ref(1, 1)
        calls[2]  add        (Ref(1, 0), Value(a tensor))         Ref(2) = output

    Attributes:
        shape: of the images.
        calls: in order.
        output: what the network answered.
    """

    shape: torch.Size
    calls: list[Call] = field(default_factory=list)
    output: Any = None

    def result(self, ref: Ref) -> Any:
        """What a call gave, or a part of it."""
        result = self.calls[ref.call].result
        return result if ref.part is None else result[ref.part]


#: Calls that tell something of a tensor which is no value of it.
_QUERIES = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr", "get_device",
    "__len__", "__hash__", "__repr__", "__format__", "untyped_storage", "storage", "register_hook", "requires_grad_",
    "__dir__", "has_names", "is_same_size", "can_cast", "result_type", "broadcast_shapes", "retain_grad", "__deepcopy__",
})  # fmt: skip
#: Those that tell its size, and operations whose result is as large as values decide.
_SIZES = frozenset({"size", "numel", "nelement", "__len__", "shape"})
_BY_VALUES = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nonzero_static"})
#: Attributes that give another tensor; all others are queries.
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})


class Recorder(TorchFunctionMode):
    """Records one pass of a network, a copy of the user's in eval mode, on images (n, C, H, W).

    Attributes:
        tape: the calls.
        path: the modules that are being called, the innermost last, "" for the network itself.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._network = network
        self.tape = Tape(images.shape)
        self.path: list[str] = []
        #: Of several names of a tensor the first one.
        self._names = {id(value): name for name, value in reversed(named_tensors(network).items())}
        self._refs: dict[int, Ref] = {id(images): Ref(-1)}
        #: Tensors whose size hangs on the values of others.
        self._sized: set[int] = set()
        #: Tensors by the memory that they share, and those that another one has been written over.
        self._memory: dict[int, list[int]] = {}
        self._overwritten: set[int] = set()
        #: Of what an index took out of a tensor and shares its memory: that tensor, and the index.
        self._part_of: dict[int, tuple[Tensor, Any]] = {}
        #: The first refusal: the network's own code may catch it.
        self._refused: UntraceableError | None = None
        self._alive: list[Any] = [images]  # so that no id is given twice
        self._paused = False

    def run(
        self, network: nn.Module, images: Tensor, entry: str | int | None = None, in_float32: InFloat32 | None = None
    ) -> Tape:
        """Record the pass.

        Args:
            network: the one that was given before.
            images: likewise.
            entry: where the logits are in the answer, None where it is a tensor (``find_logits``).
            in_float32: which types are taken for float32.

        Raises:
            UntraceableError: something in it cannot be recorded; the message names the module.
        """
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                watching(network, self._enter, self._leave),
                self,
                in_float32 or InFloat32(),
            ):
                output = network(images)
                output = output if entry is None else pick_logits(output, entry)
        except Exception:
            if self._refused is None:
                raise
        if self._refused is not None:
            raise self._refused
        self.tape.output = self._refer(output)
        if not isinstance(self.tape.output, Ref):
            raise UntraceableError(
                f"{type(own_module(network)).__name__} must give one tensor of logits computed from the images by "
                f"operations of PyTorch, not {type(output).__name__}"
            )
        return self.tape

    @property
    def where(self) -> str:
        """The module that is being called, in words."""
        return in_words(own_name(self._network, self._here))

    @property
    def _here(self) -> str:
        return self.path[-1] if self.path else ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and (arguments := self_attention_arguments(args, kwargs)) is not None:
            with self:
                return self_attention(arguments)
        name = name_of(func)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise self._refuse(
                "computes inside torch.vmap or another transformation of torch.func, where single operations cannot be recorded; "
                "write it for all images at once"
            )
        if args and id(args[0]) in self._sized and name in _SIZES:
            raise self._reads_values(f"{name.strip('_')} of a selection by values")
        asks = (name.startswith("is_") and name != "is_nonzero") or name in _QUERIES
        asks |= name == "type" and len(args) + len(kwargs) == 1
        if asks or (is_attribute(func) and name not in _TENSOR_ATTRIBUTES):
            return func(*args, **kwargs)
        described = fx.node.map_aggregate((args, kwargs), self._refer)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version, shape = (0, ()) if first is None else (first._version, first.shape)
        result = func(*args, **kwargs)
        inplace, sets_items = first is not None and result is first, name == "__setitem__"
        if inplace and first._version == version:  # type: ignore[union-attr]
            return result  # nothing happened, as of dropout in eval mode
        if sets_items:
            whole, index = self._part_of.get(id(args[2]), (None, None))
            if whole is first and index == described[0][1]:
                return None  # nothing happened: the end of y[:, :3] += 1
            result, inplace = first, True
        of_images = self._is_of_images(described)
        if not any(isinstance(part, Tensor) for part in _parts(result)):
            if of_images and result is not None:
                raise self._reads_values(name.strip("_"))
            return result
        written_over = self._watch_memory(name, args, result, inplace, of_images)
        self._record(Call(*canonical(func, *described, shape), result, of_images, self._here))
        if name == "__getitem__" and _share_memory(args[0], result):
            self._part_of[id(result)] = (args[0], described[0][1])
        if inplace:
            self._write_back(args[0], written_over)
        return None if sets_items else result

    def _is_of_images(self, described: Any) -> bool:
        """Whether a reference among arguments is to what depends on the images."""
        refs = (leaf for leaf in leaves(described) if isinstance(leaf, Ref))
        return any(ref.call < 0 or self.tape.calls[ref.call].of_images for ref in refs)

    def _write_back(self, part: Tensor, written_over: set[int]) -> None:
        """Behind an operation in place on a part of a tensor: the tensor with the new part, and so on outwards."""
        while id(part) in self._part_of:
            whole, index = self._part_of[id(part)]
            if id(whole) not in written_over:  # somebody else wrote over it before
                break
            described = (self._refer(whole), index, self._refer(part))
            of_images = self._is_of_images(described)
            self._record(Call("call_function", set_items, described, {}, whole, of_images, self._here))
            self._overwritten.discard(id(whole))
            part = whole

    def _refuse(self, said: str) -> UntraceableError:
        self._refused = self._refused or UntraceableError(f"{self.where} {said}")
        return self._refused

    def _reads_values(self, how: str) -> UntraceableError:
        if how in ("array", "numpy"):
            return self._refuse(
                "gives tensors to numpy, whose operations cannot be recorded; write them with operations of PyTorch"
            )
        return self._refuse(
            f"reads the values of tensors ({how}), so that other images may take another way; its forward must not branch or loop "
            "on the values of tensors: move such code out of the network"
        )

    def _watch_memory(self, name: str, args: tuple[Any, ...], result: Any, inplace: bool, of_images: bool) -> set[int]:
        """Note which tensors are of a size that values decide, and which this call writes over through another one."""
        given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        if any(id(tensor) in self._overwritten for tensor in given):
            raise self._refuse(
                "writes into a tensor and reads it through another view of its memory; write y = y.relu() or torch.cat instead "
                "of an operation in place on a part of y"
            )
        written_over: set[int] = set()
        by_values = name in _BY_VALUES or (name == "where" and len(args) == 1)
        by_values |= name == "__getitem__" and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
        sure_shapes = {tensor.shape for tensor in given if id(tensor) not in self._sized}
        reads_sized = any(id(tensor) in self._sized for tensor in given)
        for part in _parts(result):
            if not isinstance(part, Tensor):
                continue
            if of_images and (by_values or (reads_sized and part.shape not in sure_shapes)):
                self._sized.add(id(part))
            if part.numel() and part.layout is torch.strided:
                memory = self._memory.setdefault(part.untyped_storage().data_ptr(), [])
                if inplace:
                    written_over.update(other for other in memory if other != id(part))
                memory.append(id(part))
        written_over -= self._overwritten
        self._overwritten |= written_over
        return written_over

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
            return self._plain(value)
        if id(value) in self._refs:
            return self._refs[id(value)]
        if id(value) in self._names:
            return Named(self._names[id(value)])
        self._alive.append(value)
        return Value(value)

    def _plain(self, value: Any) -> Any:
        """An argument that is no tensor; arrays, numbers of numpy and members of enumerations as what they stand for."""
        if isinstance(value, np.ndarray):
            return Value(torch.as_tensor(value))
        value = value.value if isinstance(value, Enum) else value
        value = value.item() if isinstance(value, np.generic) else value
        kind = next((kind for kind in (bool, int, float, complex, str) if isinstance(value, kind)), None)
        return value if kind is None else kind(value)

    def _enter(self, name: str, module: nn.Module) -> None:
        if isinstance(module, Preprocess):  # recorded as one call
            self._paused = True
        else:
            self.path.append(name)

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(module, Preprocess):
            self._paused = False
            self._record(Call("call_module", name, (self._refer(args[0]),), {}, result, True, name))
        else:
            while self.path.pop() != name:  # the network's own code may catch the error of a module
                pass


@contextmanager
def watching(network: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call ``enter(name, module)`` before each module's forward, and ``leave(name, module, args, result)`` behind it."""
    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, _, name=name: enter(name, module)))
        handles.append(module.register_forward_hook(lambda *call, name=name: leave(name, *call)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_words(module: str) -> str:
    """A module of the network for messages, by its name; "" is the network itself."""
    return f"layer {module}" if module else "the network's own forward"


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network, shared ones under each of their names."""
    return dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))


def leaves(arguments: Any) -> list[Any]:
    """What tuples, lists, dicts and slices hold in the end."""
    held: list[Any] = []
    fx.node.map_aggregate(arguments, held.append)
    return held


def _share_memory(first: Any, second: Any) -> bool:
    tensors = [tensor for tensor in (first, second) if isinstance(tensor, Tensor) and tensor.layout is torch.strided]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1 == len(tensors) - 1


def _parts(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)
