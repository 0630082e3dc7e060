"""The graph of two records of one network: of two and of three images.

What is alike in both is right for any number of images. A number n that grows with them becomes k * n + c, computed from
how many images there are. Records that differ otherwise are refused.
"""

import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from types import EllipsisType, NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UntraceableError
from ..networks.preprocessing import own_name
from .lowering import TENSORS, Lowered, lower
from .parameters import Parameters
from .recording import Call, Named, Ref, Tape, Value, in_words, leaves, named_tensors

#: Parts of names that graphs, and layers in them, have for themselves, and beginnings of such.
_KINDS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
_ATTRIBUTES = frozenset(TENSORS).union(dir(fx.GraphModule({}, fx.Graph())), *(kind.__constants__ for kind in _KINDS))
#: Arguments that torch.fx writes into code as they are.
_WRITTEN = (
    bool, int, float, complex, str, NoneType, EllipsisType, range, torch.dtype, torch.layout, torch.memory_format,
)  # fmt: skip
_OWN_NAMES = ("neuron_mask", "_tensor_", "_units_")


def is_number(node: fx.Node) -> bool:
    """Whether the node computes how many images there are, or where they are."""
    return bool(node.meta.get("number"))


class Joiner:
    """Makes the graph of a network from two records, the second of one image more."""

    def __init__(self, network: nn.Module, first: Tape, second: Tape) -> None:
        self._first, self._second = first, second
        self._network = network
        self._tensors = named_tensors(network)
        #: Of several names of a parameter the first one. What norms of weights computed is a buffer now (``plain_copy``).
        self._ranks = {name: value.ndim for name, value in network.named_parameters()}
        for name, value in network.named_buffers():
            if name.rpartition(".")[2].startswith("weight"):
                self._ranks[name] = value.ndim
        self._modules = dict(network.named_modules())
        self._graph = fx.Graph()
        #: What the graph's nodes name: layers and tensors.
        self._root: dict[str, Any] = {}
        self._lowered: dict[str, Lowered] = {}
        #: The network's names of the modules in it.
        self._names: dict[str, str] = {}
        self._images = self._graph.placeholder("images")
        self._images.meta["shape"] = first.shape
        self._nodes: dict[Ref, fx.Node] = {Ref(-1): self._images}
        self._parameters = Parameters(self._tensors, first)
        self._numbers: dict[str, fx.Node] = {}

    def join(self) -> fx.GraphModule:
        """The graph, as ``tracing.trace`` gives it.

        Raises:
            UntraceableError: the records differ otherwise than by the number of images.
        """
        constant, live = self._parameters.constant, False
        for index, (call, again) in enumerate(zip(self._first.calls, self._second.calls, strict=False)):
            if (call.op, call.target) != (again.op, again.target):
                raise self._depends(call)
            varies = call.of_images or self._varies(call, again)
            constant.append(not varies)
            if varies:
                live |= getattr(call.target, "__name__", "") == "batch_norm" and call.kwargs.get("training", False)
                self._nodes[Ref(index)] = self._add(call, again)
        if len(self._first.calls) != len(self._second.calls) or self._first.output != self._second.output:
            raise self._depends(self._first.calls[-1])
        self._graph.output(self._node(self._first.output))
        for node in reversed(list(self._graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users:
                self._graph.erase_node(node)
        used = {str(node.target) for node in self._graph.nodes if node.op in ("call_module", "get_attr")}
        root = {name: value for name, value in self._root.items() if name in used}
        graph_module = fx.GraphModule(root, self._graph).eval().requires_grad_(False)
        lowered = {name: layer for name, layer in self._lowered.items() if name in used}
        graph_module.meta.update(lowered=lowered, parameters=self._ranks, live=live)
        return graph_module

    def _varies(self, call: Call, again: Call) -> bool:
        """Whether a call that is not of the images depends on how many there are."""
        first, second = (leaves((record.args, record.kwargs)) for record in (call, again))
        return len(first) != len(second) or any(
            not self._parameters.constant[value.call]
            if isinstance(value, Ref)
            else type(value) is int and value != other
            for value, other in zip(first, second, strict=True)
        )

    def _add(self, call: Call, again: Call) -> fx.Node:
        layer = lower(call, self._parameters.value)
        if layer is None:
            args, kwargs = self._joined(call, (call.args, call.kwargs), (again.args, again.kwargs))
            is_module = call.op == "call_module"
            target = self._put(call.target, self._modules[call.target]) if is_module else call.target
            node = self._graph.create_node(call.op, target, args, kwargs)
        else:
            module, arguments = layer
            node = self._graph.call_module(self._place(call, module, arguments), (self._node(arguments["input"]),))
        if isinstance(call.result, Tensor):
            node.meta["shape"] = call.shapes[0]
        node.meta["where"] = call.where
        return node

    def _place(self, call: Call, module: nn.Module, arguments: Mapping[str, Any]) -> str:
        """Put a layer into the graph; its name there."""
        weight, bias = (self._parameters.written(arguments[key]) for key in ("weight", "bias"))
        read = [name for key in TENSORS for name in self._parameters.read(arguments.get(key))]
        name = weight[0][0] if weight else next(iter(read), None)
        if name is None:  # it has no parameter
            name = f"{call.where}.{call.target.__name__}" if call.where else call.target.__name__
        elif name.endswith((".weight", ".running_mean")):
            name = name.rpartition(".")[0]
        else:
            name = name.removesuffix("_weight").removesuffix(".") or name
        free = self._put(name, module)
        is_plain = arguments["weight"] == Named(f"{free}.weight")
        plain_bias = isinstance(arguments["bias"], Named)
        self._lowered[free] = Lowered(name, weight, bias, tuple(dict.fromkeys(read)), is_plain, plain_bias)
        return free

    def _put(self, name: str, module: nn.Module) -> str:
        """Put a module of the network into the graph; its name there."""
        safe = free = _identifiers(name)
        number = 1
        while free in self._root and not (self._names.get(free) == name and _same(self._root[free], module)):
            number += 1
            free = f"{safe}_use{number}"
        self._root.setdefault(free, module)
        self._names[free] = name
        return free

    def _joined(self, call: Call, value: Any, again: Any) -> Any:
        """An argument in both records as an argument of the graph."""
        if type(value) is not type(again):
            raise self._depends(call)
        if isinstance(value, Named | Value):
            return self._attribute(call, value, again)
        if isinstance(value, tuple | list | dict) and len(value) != len(again):
            raise self._depends(call)
        if isinstance(value, tuple | list):
            joined = [self._joined(call, *pair) for pair in zip(value, again, strict=True)]
            return tuple(joined) if isinstance(value, tuple) else joined
        if isinstance(value, dict):
            return dict(self._joined(call, list(value.items()), list(again.items())))
        if isinstance(value, slice):
            ends = ((part.start, part.stop, part.step) for part in (value, again))
            return slice(*self._joined(call, *ends))
        if isinstance(value, torch.device):
            return self._number("device", getattr, self._images, "device")
        if not isinstance(value, (Ref, *_WRITTEN)):
            raise UntraceableError(
                f"{self._where(call)} gives a {type(value).__name__} to an operation of PyTorch, which no graph can hold; "
                "give it tensors and numbers"
            )
        if type(value) is int and value != again:
            return self._counted(value, again)
        if value != again and not (value != value and again != again):  # not a number both times
            raise self._depends(call)
        return self._node(value) if isinstance(value, Ref) else value

    def _counted(self, value: int, again: int) -> fx.Node:
        """A number that grows with how many images there are."""
        step = again - value
        offset = value - step * self._first.shape[0]
        number = self._number("count", "size", self._images, 0)
        if step != 1:
            number = self._number(f"{step}", operator.mul, number, step)
        return self._number(f"{step}+{offset}", operator.add, number, offset) if offset else number

    def _number(self, key: str, target: Any, *args: Any) -> fx.Node:
        if key not in self._numbers:
            op = "call_method" if isinstance(target, str) else "call_function"
            self._numbers[key] = self._graph.create_node(op, target, args)
            self._numbers[key].meta["number"] = True
        return self._numbers[key]

    def _node(self, ref: Ref) -> fx.Node:
        if ref not in self._nodes:
            call = self._first.calls[ref.call]
            if self._parameters.constant[ref.call]:
                value, again = (Value(tape.result(ref)) for tape in (self._first, self._second))
                self._nodes[ref] = self._attribute(call, value, again, self._parameters.read(ref))
            else:
                node = self._graph.call_function(operator.getitem, (self._nodes[Ref(ref.call)], ref.part))
                node.meta["shape"] = call.shapes[ref.part or 0]
                self._nodes[ref] = node
        return self._nodes[ref]

    def _attribute(self, call: Call, value: Named | Value, again: Named | Value, read: Sequence[str] = ()) -> fx.Node:
        """A tensor that the network brings along, or that is computed from parameters (``read``) alone."""
        parameter = value.name if isinstance(value, Named) else None
        if isinstance(value, Named):
            tensor, read = self._tensors[value.name], (value.name,)
        else:
            assert isinstance(again, Value)
            tensor = value.tensor
            if tensor.shape != again.tensor.shape or not torch.equal(tensor, again.tensor):
                raise UntraceableError(
                    f"{self._where(call)} reads a tensor that is another one in each pass, and that no operation of PyTorch "
                    "made: by a function of TorchScript, numpy or C++, or at random; write it with operations of PyTorch, or "
                    "take it out"
                )
        name = f"_tensor_{len(self._root)}"
        self._root[name] = tensor
        node = self._graph.get_attr(name)
        node.meta.update(shape=tensor.shape, read=tuple(read), parameter=parameter)
        return node

    def _where(self, call: Call) -> str:
        return in_words(own_name(self._network, call.where))

    def _depends(self, call: Call) -> UntraceableError:
        return UntraceableError(
            f"{self._where(call)} does other things with two images than with three: the network's forward must not depend on "
            "how many images it is given, but treat each on its own"
        )


def _same(layer: Any, other: nn.Module) -> bool:
    """Whether two layers are alike, with equal tensors."""
    if repr(layer) != repr(other):
        return False
    pairs = [(getattr(layer, key, None), getattr(other, key, None)) for key in TENSORS]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _identifiers(name: str) -> str:
    """A name for the graph: torch.fx compiles code with the names of layers in it, so that they are letters and digits alone."""
    parts = (re.sub(r"[^0-9A-Za-z_]", "_", part) for part in name.split("."))
    return ".".join(f"{part}_" if _is_reserved(part) else part for part in parts)


def _is_reserved(part: str) -> bool:
    """Whether a part of a name cannot be one in a graph: a word of Python, or an attribute that modules there have already."""
    return keyword.iskeyword(part) or part in _ATTRIBUTES or part.startswith(_OWN_NAMES)
