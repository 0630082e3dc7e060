"""A network as a torch.fx graph without in-place operations, in which every layer with neurons is one module.

Two passes are recorded, of two and of three images. What is alike in both is right for any number of images; a number that
grows with them is computed from how many there are; a record that differs otherwise is refused.
"""

import keyword
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import DataError, UntraceableError
from ..networks.adapting import find_logits, pick_logits
from ..networks.preprocessing import own_module
from .copying import plain_copy
from .lowering import Lowered, lower
from .parameters import Parameters, result_of
from .recording import Call, Named, Recorder, Ref, Tape, Value, named_tensors

#: Sides of images that are tried where none are given: usual ones, then all small ones.
USUAL_SIDES = (32, 28, 224, 64, 96, 128, 8, 16, 299, 256, 112, 160, 192, 240, 288, 300, 320, 384, 448, 512)
SIDES = (*USUAL_SIDES, *(side for side in range(1, 80) if side not in USUAL_SIDES))
#: Arguments of a layer that are tensors.
_TENSORS = ("weight", "bias", "running_mean", "running_var")
#: Largest difference of logits, over the largest of them, that rounding may make.
ROUNDING = 1e-3


def trace(network: nn.Module, images: Tensor | None = None) -> fx.GraphModule:
    """A traced copy of the network in eval mode and float32, on the CPU, without in-place operations.

    Args:
        network: it is left as it is.
        images: some that it takes, float32 (n, C, H, W). The graph is right for images of that size. Without any, images of
            usual sizes are tried.

    Returns:
        The graph. Its ``meta["lowered"]`` says of each layer which parameters of the network it has (``Lowered``), and
        ``meta["live"]`` whether a batch normalisation takes the statistics of the batch; a node's ``meta["shape"]`` is that of
        its value for two images.

    Raises:
        UntraceableError: the network cannot be traced; the message names the layer.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UntraceableError(
                f"{f'layer {name}' if name else 'the network'} is TorchScript, which does not show its layers; give the Python "
                "module that it was made from, and load its state dict"
            )
    if any(nn.parameter.is_lazy(one) for one in (*network.parameters(), *network.buffers())):
        raise UntraceableError(
            "the network has lazy layers that were never called; call it once with some images before"
        )
    copied = plain_copy(network).eval().float().cpu()
    known = named_tensors(copied).keys()
    three = _three(_guess(copied) if images is None else images)
    with torch.no_grad():
        try:
            expected = copied(three.clone())  # also fills what the network keeps for later
            entry = None if isinstance(expected, Tensor) else find_logits(expected)
            expected = expected if entry is None else pick_logits(expected, entry)
        except DataError as error:
            raise UntraceableError(str(error)) from error
        except Exception as error:  # the user's code, which can raise anything
            raise UntraceableError(_cannot_take(type(own_module(network)).__name__, three, error)) from error
    made = [name for name in named_tensors(copied) if name not in known]
    if made:
        raise UntraceableError(
            f"the network makes {made[0]} when it is first called; call it once with some images before"
        )
    try:
        graph_module = _Build(copied, _record(copied, three[:2], entry), _record(copied, three, entry)).run()
        _check(graph_module, expected, three)
    except UntraceableError as error:
        if _is_random(copied, three, expected):
            raise UntraceableError(
                "the network gives other answers each time to the same images; take what is random out of its forward, or keep "
                "it to training"
            ) from error
        raise
    return graph_module


@torch.no_grad()
def _is_random(network: nn.Module, images: Tensor, expected: Any) -> bool:
    again = network(images.clone())
    return isinstance(again, Tensor) and isinstance(expected, Tensor) and not torch.equal(again, expected)


def is_number(node: fx.Node) -> bool:
    """Whether the node computes how many images there are, or where they are."""
    return bool(node.meta.get("number"))


def _three(images: Tensor) -> Tensor:
    """Three different images."""
    three = torch.cat([images[:3].detach().cpu().float()] * 3)[:3]
    return three * torch.tensor([1, 0.9, 0.8]).view(-1, *[1] * (three.ndim - 1))


def _record(network: nn.Module, images: Tensor, entry: str | int | None) -> Tape:
    images = images.clone()
    recorder = Recorder(network, images)
    try:
        return recorder.run(network, images, entry)
    except UntraceableError:
        raise
    except Exception as error:  # the user's code, which can raise anything
        raise UntraceableError(_cannot_take(recorder.where, images, error)) from error


def _cannot_take(what: str, images: Tensor, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{what} cannot take {len(images)} images of shape {tuple(images.shape[1:])} ({reason}); are these the images that it "
        "was made for (clean=, --image-size)?"
    )


def _guess(network: nn.Module) -> Tensor:
    """Images that the network takes: of as many channels as its first layer reads, of the first size that works."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)), None)
    counts = (first.in_channels, 3, 1) if isinstance(first, nn.Conv2d) else (3, 1)
    generator = torch.Generator().manual_seed(0)
    for channels in dict.fromkeys(counts):
        for side in SIDES:
            images = torch.rand(2, channels, side, side, generator=generator)
            with torch.no_grad(), suppress(Exception):  # of another size; the user's code can raise anything
                answer = network(images.clone())
                if not isinstance(answer, Tensor) or len(answer) == len(images):  # not where positions became images
                    return images
    raise UntraceableError(
        f"{type(own_module(network)).__name__} takes no images of a usual size; show it some: clean=(images, labels), or --clean "
        "and --image-size on the command line"
    )


@torch.no_grad()
def _check(graph_module: fx.GraphModule, expected: Any, images: Tensor) -> None:
    """The graph must answer as the network does, in another order in memory and for a single image too."""
    wrong = "the record of its forward does not give the same logits"
    try:
        found = graph_module(images.contiguous(memory_format=torch.channels_last))
        alone = found[:1] if graph_module.meta["live"] else graph_module(images[:1].clone())
    except Exception as error:  # the user's operations
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UntraceableError(
            f"the network's forward cannot be run again from its record ({reason}); it must treat each image on its own, and "
            "work on no tensor through the memory of another"
        ) from error
    bound = ROUNDING * expected.abs().max() + 1e-6
    if not isinstance(found, Tensor) or found.shape != expected.shape or not (found - expected).abs().max() <= bound:
        raise UntraceableError(
            f"{wrong}: it must give the same each time, and write into no tensor that others look at"
        )
    if alone.shape != expected[:1].shape or not (alone - expected[:1]).abs().max() <= bound:
        raise UntraceableError(f"{wrong} for a single image: it depends on how many images it is given")


class _Build:
    """The graph of two records of one network, the second of one image more."""

    def __init__(self, network: nn.Module, first: Tape, second: Tape) -> None:
        self.first, self.second = first, second
        self.tensors = named_tensors(network)
        self.names = frozenset(name for name, _ in network.named_parameters(remove_duplicate=False))
        self.modules = dict(network.named_modules())
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.lowered: dict[str, Lowered] = {}
        self.images = self.graph.placeholder("images")
        self.images.meta["shape"] = first.shape
        self.nodes: dict[Ref, fx.Node] = {Ref(-1): self.images}
        self.parameters = Parameters(self.tensors, first)
        self.constant = self.parameters.constant
        self._numbers: dict[str, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        live = False
        for index, (one, other) in enumerate(zip(self.first.calls, self.second.calls, strict=False)):
            if (one.op, one.target) != (other.op, other.target):
                raise self._depends(one)
            varies = one.of_images or self._varies((one.args, one.kwargs), (other.args, other.kwargs))
            self.constant.append(not varies)
            if varies:
                live |= getattr(one.target, "__name__", "") == "batch_norm" and one.kwargs.get("training", False)
                self.nodes[Ref(index)] = self._add(one, other)
        if len(self.first.calls) != len(self.second.calls) or self.first.output != self.second.output:
            raise self._depends(self.first.calls[-1])
        self.graph.output(self._node(self.first.output))
        for node in reversed(list(self.graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users:
                self.graph.erase_node(node)
        used = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        graph_module = fx.GraphModule(
            {name: value for name, value in self.root.items() if name in used}, self.graph
        ).eval()
        for parameter in graph_module.parameters():
            parameter.requires_grad_(False)
        graph_module.meta["parameters"] = self.names
        graph_module.meta.update(lowered={key: one for key, one in self.lowered.items() if key in used}, live=live)
        return graph_module

    def _add(self, one: Call, other: Call) -> fx.Node:
        found = lower(one, self.parameters.value)
        if found is None:
            args, kwargs = self._join(one, (one.args, one.kwargs), (other.args, other.kwargs))
            node = self.graph.create_node(one.op, one.target, args, kwargs)
            if one.op == "call_module":
                self.root[one.target] = self.modules[one.target]
        else:
            module, bound = found
            node = self.graph.call_module(self._place(one, module, bound), (self._node(bound["input"]),))
        if isinstance(one.result, Tensor):
            node.meta["shape"] = one.shapes[0]
        node.meta["where"] = one.where
        return node

    def _place(self, call: Call, module: nn.Module, bound: Mapping[str, Any]) -> str:
        """Put a layer into the graph; its name there."""
        weight, bias = (self.parameters.written(bound[key]) for key in ("weight", "bias"))
        read = [one for key in _TENSORS for one in self.parameters.read(bound.get(key))]
        name = weight[0][0] if weight else next(iter(read), None)
        if name is None:  # it has no parameter
            name = f"{call.where}.{call.target.__name__}" if call.where else call.target.__name__
        elif name.endswith((".weight", ".running_mean")):
            name = name.rpartition(".")[0]
        else:
            name = name.removesuffix("_weight")
        safe = free = ".".join(f"{part}_" if _is_reserved(part) else part for part in name.split("."))
        number = 1
        while free in self.root and not (isinstance(self.root[free], nn.Module) and _same(self.root[free], module)):
            number += 1
            free = f"{safe}_use{number}"
        self.root.setdefault(free, module)
        plain = isinstance(bound["weight"], Named) and bound["weight"].name == f"{free}.weight"
        self.lowered[free] = Lowered(name, weight, bias, tuple(dict.fromkeys(read)), plain)
        return free

    def _varies(self, one: Any, other: Any) -> bool:
        """Whether arguments that are not of the images depend on how many there are."""
        if isinstance(one, Ref):
            return not self.constant[one.call]
        if isinstance(one, tuple | list):
            return len(one) != len(other) or any(map(self._varies, one, other))
        if isinstance(one, dict):
            return any(self._varies(one[key], other.get(key)) for key in one)
        if isinstance(one, slice):
            return self._varies((one.start, one.stop, one.step), (other.start, other.stop, other.step))
        return type(one) is int and one != other

    def _join(self, call: Call, one: Any, other: Any) -> Any:
        """An argument in both records as one of the graph."""
        if type(one) is not type(other):
            raise self._depends(call)
        if isinstance(one, Ref):
            if one != other:
                raise self._depends(call)
            return self._node(one)
        if isinstance(one, Named | Value):
            return self._attribute(call, one, other)
        if isinstance(one, tuple | list):
            if len(one) != len(other):
                raise self._depends(call)
            return type(one)(self._join(call, *pair) for pair in zip(one, other, strict=True))
        if isinstance(one, dict):
            return {key: self._join(call, one[key], other[key]) for key in one}
        if isinstance(one, slice):
            parts = ((one.start, other.start), (one.stop, other.stop), (one.step, other.step))
            return slice(*(self._join(call, *pair) for pair in parts))
        if isinstance(one, torch.device):
            return self._number("device", lambda: self.graph.call_function(getattr, (self.images, "device")))
        if type(one) is int and one != other:
            return self._counted(one, other)
        if one != other and not (one != one and other != other):  # not a number both times
            raise self._depends(call)
        return one

    def _counted(self, one: int, other: int) -> fx.Node:
        """A number that grows with how many images there are."""
        step = other - one
        offset = one - step * self.first.shape[0]
        count = self._number("count", lambda: self.graph.call_method("size", (self.images, 0)))
        many = (
            count
            if step == 1
            else self._number(f"{step}", lambda: self.graph.call_function(operator.mul, (count, step)))
        )
        return (
            many
            if not offset
            else self._number(f"{step}+{offset}", lambda: self.graph.call_function(operator.add, (many, offset)))
        )

    def _number(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._numbers:
            self._numbers[key] = make()
            self._numbers[key].meta["number"] = True
        return self._numbers[key]

    def _node(self, ref: Ref) -> fx.Node:
        if ref not in self.nodes:
            if self.constant[ref.call]:
                value, again = (Value(result_of(tape, ref)) for tape in (self.first, self.second))
                self.nodes[ref] = self._attribute(self.first.calls[ref.call], value, again, self.parameters.read(ref))
            else:
                self.nodes[ref] = self.graph.call_function(operator.getitem, (self.nodes[Ref(ref.call)], ref.part))
                self.nodes[ref].meta["shape"] = self.first.calls[ref.call].shapes[ref.part or 0]
        return self.nodes[ref]

    def _attribute(self, call: Call, one: Named | Value, other: Named | Value, read: Sequence[str] = ()) -> fx.Node:
        """A tensor that the network brings along, or that is computed from parameters (``read``) alone."""
        if isinstance(one, Named):
            tensor, read = self.tensors[one.name], (one.name,)
        else:
            assert isinstance(other, Value)
            tensor, again = one.tensor, other.tensor
            if tensor.shape != again.shape or not torch.equal(tensor, again):
                raise UntraceableError(
                    f"{_where(call)} reads a tensor that is another one in each pass, and that no operation of PyTorch made: by a "
                    "function of TorchScript, numpy or C++, or at random; write it with operations of PyTorch, or take it out"
                )
        name = f"_tensor_{len(self.root)}"
        self.root[name] = tensor
        node = self.graph.get_attr(name)
        # "read" are the parameters that it is of, and "parameter" the one that it is.
        node.meta.update(shape=tensor.shape, read=tuple(read), parameter=one.name if isinstance(one, Named) else None)
        return node

    def _depends(self, call: Call) -> UntraceableError:
        return UntraceableError(
            f"{_where(call)} does other things with two images than with three: the network's forward must not depend on how "
            "many images it is given, but treat each on its own"
        )


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers are alike, with equal tensors."""
    pairs = [(getattr(one, key, None), getattr(other, key, None)) for key in _TENSORS]
    alike = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
    return repr(one) == repr(other) and alike


def _is_reserved(part: str) -> bool:
    """Whether a part of a name cannot be one in a graph: a word of Python, or an attribute that graphs have themselves."""
    return (
        keyword.iskeyword(part)
        or hasattr(fx.GraphModule, part)
        or part in ("graph", "meta")
        or part.startswith("neuron_mask")
    )


def _where(call: Call) -> str:
    return f"layer {call.where}" if call.where else "the network's own forward"
