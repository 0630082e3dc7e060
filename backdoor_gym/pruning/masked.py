"""A network under changing masks, on fixed images: only what a changed neuron changes is computed again."""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..devices import find_device
from .channels import mask_channels
from .folding import fold_norms
from .neurons import Neurons
from .operations import Operations
from .reversing import Kept, by_autograd, mask_derivatives
from .selecting import select

#: Upper bound of the activations kept between calls, in bytes: of the whole network, of the base and of the last mask
#: together. What is given up first is what costs least to compute again.
KEPT_BYTES = 1 << 30
#: Share of the channels of a layer up to which a change is followed channel by channel.
FEW = 0.25


class MaskedNetwork:
    """Logits of some images under any mask: up to rounding those of the network with the mask written into its weights.

    The activations of one mask, the *base*, are kept: those that a mask multiplies and those that several operations
    read. ``logits(mask)`` computes only what differs from the base; ``keep()`` makes the last mask the new base. As long as
    only a few channels of a value differ, only these are computed, and the convolution that reads them adds what they
    change to what it gave before: a small part of its work.

    Args:
        neurons: of the network.
        images: float32 (n, C, H, W) in [0, 1].
        device: where to compute.
        kept_bytes: bound of the kept activations.
    """

    def __init__(
        self, neurons: Neurons, images: Tensor, device: str | torch.device = "cpu", kept_bytes: int = KEPT_BYTES
    ) -> None:
        _let_memory_stay()
        self.neurons = neurons
        self.device = find_device(device)
        graph = _folded(neurons)
        self._graph = graph
        graph.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._operations = Operations(graph)
        self._nodes = list(graph.graph.nodes)
        self._order = {node: position for position, node in enumerate(self._nodes)}
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._behind = _behind(self._nodes)
        self._sizes = _Sizes(graph)
        self._sizes.run(images[:1].to(self.device))
        images = images.to(self.device, memory_format=torch.channels_last)
        self._kept_nodes = self._choose_kept(images, kept_bytes)
        self._base: dict[fx.Node, Any] = {self._inputs[0]: images}
        self._base_mask = np.ones(len(neurons), dtype=bool)
        self._pending: dict[fx.Node, Any] = {}
        self._evaluate(self._base_mask, set(self._nodes) - set(self._inputs))
        self.keep()
        self._whole = self._base

    def __len__(self) -> int:
        return len(self._base[self._inputs[0]])

    @property
    def pass_bytes(self) -> int:
        """Size of all values of a pass of the images, one after the other, in bytes."""
        return len(self) * sum(self._sizes.bytes.values())

    def reset(self) -> None:
        """Make "nothing pruned" the base."""
        self._base, self._base_mask = self._whole, np.ones(len(self.neurons), dtype=bool)
        self._pending = {}
        self._pending_mask = self._base_mask

    def fork(self) -> Self:
        """The same images under masks of its own; the activations of the whole network are shared."""
        twin = copy(self)
        twin.reset()
        return twin

    def logits(self, mask: np.ndarray) -> Tensor:
        """Logits (n, classes) under the mask, bool (neurons,), True where kept; asked twice in a row, computed once."""
        if self._pending and np.array_equal(mask, self._pending_mask):
            return self._pending[self._nodes[-1]]
        changed = self._changed(mask)
        dirty: set[fx.Node] = set().union(*(self._behind[self._inputs[1 + layer]] for layer in changed))
        return self._evaluate(mask, dirty)

    def keep(self) -> None:
        """Make the mask that ``logits`` was last called with the base."""
        settled = {
            node: value.within(self._base[node]) if isinstance(value, _Some) else value
            for node, value in self._pending.items()
        }
        self._base, self._base_mask = {**self._base, **settled}, self._pending_mask
        self._pending = {}

    def mask_gradient(
        self, mask: np.ndarray, quantity: Callable[[Tensor], Tensor], rows: Tensor | None = None
    ) -> Tensor:
        """Derivative of a quantity of the logits by each neuron's mask, float32 (neurons,), where the mask is the base.

        What is kept saves the forward pass. The mask becomes the base.

        Args:
            mask: where the derivative is taken, bool (neurons,), True where kept.
            quantity: from logits (n, classes) to a scalar.
            rows: which images, int64 (n,); None for all.
        """
        if not np.array_equal(mask, self._base_mask):
            self.logits(mask)
            self.keep()
        masks = self.neurons.layer_masks(mask, self.device)
        named = dict(zip(self._inputs[1:], masks, strict=True))
        if self._sizes.several:
            images = self._base[self._inputs[0]]
            sizes = [layer.size for layer in self.neurons.layers]
            return by_autograd(
                self._graph, images if rows is None else images[rows.to(self.device)], masks, sizes, quantity
            )
        kept: Kept = self._base
        if rows is not None:
            of_images = {self._inputs[0]} | (self._behind[self._inputs[0]] & self._sizes.batched)
            kept = _Rows(self._base, rows.to(self.device), of_images)
        found = mask_derivatives(self._operations, kept, named, quantity)
        return torch.cat(
            [
                found[mask] if mask in found else torch.zeros(layer.size, device=self.device)
                for mask, layer in zip(self._inputs[1:], self.neurons.layers, strict=True)
            ]
        )

    def _changed(self, mask: np.ndarray) -> list[int]:
        """The layers in which the mask differs from that of the base."""
        differs = np.flatnonzero(mask != self._base_mask)
        return np.unique(self.neurons.layer_index[differs]).tolist()

    @torch.no_grad()
    def _evaluate(self, mask: np.ndarray, dirty: set[fx.Node]) -> Tensor:
        output = self._nodes[-1]
        masks = dict(zip(self._inputs[1:], self.neurons.layer_masks(mask, self.device), strict=True))
        differing = {
            self._inputs[1 + layer]: np.flatnonzero(
                mask[self.neurons.layers[layer].neurons] != self._base_mask[self.neurons.layers[layer].neurons]
            )
            for layer in self._changed(mask)
        }
        run = _Pass(self, masks, differing, dirty)
        self._pending_mask = mask.copy()
        self._pending = {}
        plan = self._plan(output, dirty)
        inputs = self._operations.inputs
        last_use = {source: node for node in plan for source in inputs[node]}
        for node in plan:
            value = run.values[node] = run.value(node)
            if node in self._kept_nodes and node in dirty:
                self._pending[node] = value
            for source in inputs[node]:
                if last_use[source] is node:
                    run.values.pop(source, None)
        return run.values[output] if output in run.values else self._base[output]

    def _plan(self, output: fx.Node, dirty: set[fx.Node]) -> list[fx.Node]:
        """The operations to run, in order: from what is kept and not behind a change to the output."""
        needed: set[fx.Node] = set()
        front = [output]
        while front:
            node = front.pop()
            if node in needed or node.op == "placeholder" or (node not in dirty and node in self._base):
                continue
            needed.add(node)
            front.extend(self._operations.inputs[node])
        return sorted(needed, key=self._order.__getitem__)

    def _choose_kept(self, images: Tensor, kept_bytes: int) -> set[fx.Node]:
        """What a mask multiplies, the smallest first, then what several operations read, as far as there is room."""
        sizes = self._sizes
        masked = {node.all_input_nodes[0] for node in self._nodes if node.target is mask_channels}
        candidates = {
            node
            for node in self._nodes
            if node.op == "output" or (node.op not in ("placeholder", "get_attr") and len(node.users) > 1)
        } | masked
        kept: set[fx.Node] = set()
        total = 0
        for node in sorted(candidates, key=lambda node: (node not in masked, sizes.bytes.get(node, 0))):
            size = sizes.bytes.get(node, 0) * len(images)
            if 3 * (total + size) > kept_bytes and node.op != "output":
                continue
            total += size
            kept.add(node)
        return kept


@dataclass(frozen=True)
class _Some:
    """A value that differs from that of the base in some of its ``size`` channels alone, and what these are then and now."""

    size: int
    channels: Tensor
    before: Tensor
    now: Tensor

    def within(self, base: Tensor) -> Tensor:
        """The whole value."""
        return base.clone().index_copy_(1, self.channels, self.now)  # index_copy would lose the order in memory


@dataclass(frozen=True)
class _Shifted:
    """A value that is that of the base, which is not kept, plus this."""

    by: Tensor


class _Pass:
    """One evaluation: values under a mask, from those of the base."""

    def __init__(
        self,
        network: MaskedNetwork,
        masks: dict[fx.Node, Tensor | None],
        differing: dict[fx.Node, np.ndarray],
        dirty: set[fx.Node],
    ) -> None:
        self.base, self.dirty, self.masks, self.differing = network._base, dirty, masks, differing
        self.operations = network._operations
        self.base_mask, self.neurons, self.inputs = network._base_mask, network.neurons, network._inputs
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Of a node whose inputs have been asked for: a tensor, ``_Some`` or ``_Shifted``."""
        found = self._from_base(node) if node in self.dirty else None
        return self._operate(node) if found is None else found

    def dense(self, node: fx.Node) -> Any:
        """The whole value of any node."""
        if node in self.masks:
            return self.masks[node]
        found = self.values.get(node)
        if isinstance(found, _Some) and node in self.base:
            found = found.within(self.base[node])
        elif found is None and node not in self.dirty and node in self.base:
            return self.base[node]
        elif found is None or isinstance(found, _Some | _Shifted):
            found = self._operate(node)
        self.values[node] = found
        return found

    def _operate(self, node: fx.Node) -> Any:
        return self.operations.run(node, self.dense)

    def _from_base(self, node: fx.Node) -> Any:
        """The value by what differs from the base, None where there is no such way."""
        if node.target is mask_channels:
            return self._masked(node)
        inputs = self.operations.inputs[node]
        states = [self.values.get(source) for source in inputs]
        if len(inputs) == 1 and _slices(self.operations, node):
            return self._on_channels(node, states[0])
        if node in self.operations.sums:
            return self._sum(node, inputs, states)
        if type(self.operations.modules[node]) is nn.Conv2d:  # not one with a forward of its own
            return self._convolved(node, states[0])
        return None

    def _masked(self, node: fx.Node) -> _Some | None:
        source, mask = self.operations.inputs[node]
        channels = self.differing.get(mask)
        if node.args[2:] not in ((), (1,)) or source in self.dirty or source not in self.base or channels is None:
            return None
        layer = self.neurons.layers[self.inputs.index(mask) - 1]
        if len(channels) > FEW * layer.size:
            return None
        values = self.dense(source)
        kept_before = torch.from_numpy(self.base_mask[layer.neurons][channels].astype(np.float32))
        index = torch.from_numpy(channels).to(values.device)
        some = select(values, 1, index)
        shape = (-1, *[1] * (some.ndim - 2))
        kept_before = kept_before.to(values.device).view(shape)
        return _Some(layer.size, index, some * kept_before, some * (1 - kept_before))

    def _on_channels(self, node: fx.Node, state: Any) -> _Some | None:
        if not isinstance(state, _Some):
            return None
        (source,) = self.operations.inputs[node]

        def on(values: Tensor) -> Tensor:
            return self.operations.run(node, lambda one: values if one is source else self.dense(one))

        return _Some(state.size, state.channels, on(state.before), on(state.now))

    def _sum(self, node: fx.Node, inputs: tuple[fx.Node, ...], states: list[Any]) -> Any:
        for (state, source), other in zip(zip(states, inputs, strict=True), reversed(inputs), strict=True):
            if other in self.dirty or other is source:
                continue
            if isinstance(state, _Shifted):
                return self.base[node] + state.by if node in self.base else state
            if isinstance(state, _Some):
                beside = self.dense(other)
                if not isinstance(beside, Tensor) or beside.ndim != state.now.ndim:
                    return None
                if beside.shape[1] != state.size or beside.shape[2:] != state.now.shape[2:]:
                    return None
                beside = select(beside, 1, state.channels)
                return _Some(state.size, state.channels, state.before + beside, state.now + beside)
        return None

    def _convolved(self, node: fx.Node, state: Any) -> Any:
        module = self.operations.modules[node]
        if not isinstance(state, _Some) or not isinstance(module, nn.Conv2d) or module.groups > 1:
            return None
        summed = len(node.users) == 1 and next(iter(node.users)) in self.operations.sums
        if module.padding_mode != "zeros" or not (node in self.base or summed):
            return None
        weight = module.weight.index_select(1, state.channels)
        # A single channel has to be marked as channels last, or all that follows has another order in memory.
        change = torch.empty_like(state.now, memory_format=torch.channels_last)
        torch.sub(state.now, state.before, out=change)
        by = F.conv2d(change, weight, None, module.stride, module.padding, module.dilation)
        return by.add_(self.base[node]) if node in self.base else _Shifted(by)


class _Rows:
    """Some images of kept activations."""

    def __init__(self, values: dict[fx.Node, Any], rows: Tensor, batched: set[fx.Node]) -> None:
        self._values, self._rows, self._batched = values, rows, batched

    def __contains__(self, node: object) -> bool:
        return node in self._values and node in self._batched

    def __getitem__(self, node: fx.Node) -> Tensor:
        return select(self._values[node], 0, self._rows)


class _Sizes(fx.Interpreter):
    """What a pass of one image shows of each value.

    Attributes:
        bytes: of an image's value.
        batched: nodes whose first axis is that of the images.
        several: whether some node gives several tensors.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.bytes: dict[fx.Node, int] = {}
        self.batched: set[fx.Node] = set()
        self.several = False

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if isinstance(value, Tensor):
            if value.ndim and len(value) == 1 and n.op != "get_attr":
                self.batched.add(n)
            if n.op != "output":
                self.bytes[n] = value.numel() * value.element_size()
        elif isinstance(value, tuple | list | dict) and not isinstance(value, torch.Size):
            self.several = True
        return value


def _let_memory_stay() -> None:
    """Where the C library is glibc: let it keep up to 64 MiB of freed memory, of which every operation asks for some anew.

    It otherwise gives most of it back to the system, and the next operation waits until the system has cleared it. How much
    it keeps follows from the largest piece below 32 MiB that was freed so far; this one is never written to.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


#: What is folded of each network, for as long as the network is used.
_FOLDED: WeakKeyDictionary[Neurons, fx.GraphModule] = WeakKeyDictionary()


def _folded(neurons: Neurons) -> fx.GraphModule:
    if neurons not in _FOLDED:
        _FOLDED[neurons] = fold_norms(neurons.graph)
    return _FOLDED[neurons]


#: What may be done to some channels of a value alone: neither their number nor their places matter.
_SLICED_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.Identity, nn.Dropout, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_SLICED_FUNCTIONS = {F.relu, torch.relu, "relu", F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.gelu, F.silu}


def _slices(operations: Operations, node: fx.Node) -> bool:
    """Whether the operation may be done on some channels alone."""
    if node.op == "call_module":
        return type(operations.modules[node]) in _SLICED_MODULES
    return node.target in _SLICED_FUNCTIONS


def _behind(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The nodes that depend on each node, itself left out."""
    behind: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(list(nodes)):
        behind[node] = set(node.users).union(*(behind[user] for user in node.users))
    return behind
