"""One evaluation of a network under a mask, from what is kept of another one: only what differs is computed.

As long as only a few channels of a value differ, only these are computed, and the convolution that reads them adds what they
change to what it gave before: a small part of its work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..neurons.channels import mask_channels
from ..neurons.operations import operation
from .memory_format import select
from .plan import Plan

#: Share of the channels of a layer up to which a change is followed channel by channel.
FEW = 0.25


@dataclass(frozen=True)
class SomeChannels:
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


class Evaluation:
    """Values under a mask, from those of the base.

    Args:
        plan: of the network.
        base: values under the mask of the base, by node, at least the images.
        base_mask: bool (neurons,), True where kept.
        mask: the one that is asked for, bool (neurons,).
    """

    def __init__(self, plan: Plan, base: Mapping[fx.Node, Any], base_mask: np.ndarray, mask: np.ndarray) -> None:
        self.plan = plan
        self.neurons, self.operations, self.inputs = plan.neurons, plan.operations, plan.inputs
        self.base, self.base_mask = base, base_mask
        self.masks = dict(zip(self.inputs[1:], plan.masks(mask), strict=True))
        self.differing = {
            self.inputs[1 + layer]: np.flatnonzero(
                mask[self.neurons.layers[layer].neurons] != base_mask[self.neurons.layers[layer].neurons]
            )
            for layer in np.unique(self.neurons.layer_index[np.flatnonzero(mask != base_mask)]).tolist()
        }
        self.dirty: set[fx.Node] = set().union(*(plan.behind[node] for node in self.differing))
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def run(self) -> dict[fx.Node, Any]:
        """What is to be kept of the values that differ from the base; the logits are among them, if they do."""
        plan = self._plan()
        last_use = {source: node for node in plan for source in self.operations.inputs[node]}
        kept = {}
        for node in plan:
            value = self.values[node] = self.value(node)
            if node in self.plan.kept:
                kept[node] = value
            for source in self.operations.inputs[node]:
                if last_use[source] is node:
                    self.values.pop(source, None)
        return kept

    def _plan(self) -> list[fx.Node]:
        """The operations to run, in order: from what is kept and not behind a change to the logits."""
        needed: set[fx.Node] = set()
        front = [self.plan.output]
        while front:
            node = front.pop()
            if node in needed or node.op == "placeholder" or (node not in self.dirty and node in self.base):
                continue
            needed.add(node)
            front.extend(self.operations.inputs[node])
        return sorted(needed, key=self.plan.order.__getitem__)

    def value(self, node: fx.Node) -> Any:
        """Of a node whose inputs have been asked for: a tensor, ``SomeChannels`` or ``_Shifted``."""
        value = self._from_base(node) if node in self.dirty else None
        return self._operate(node) if value is None else value

    def dense(self, node: fx.Node) -> Any:
        """The whole value of any node."""
        if node in self.masks:
            return self.masks[node]
        value = self.values.get(node)
        if isinstance(value, SomeChannels) and node in self.base:
            value = value.within(self.base[node])
        elif value is None and node not in self.dirty and node in self.base:
            return self.base[node]
        elif value is None or isinstance(value, SomeChannels | _Shifted):
            value = self._operate(node)
        self.values[node] = value
        return value

    def _operate(self, node: fx.Node) -> Any:
        return self.operations.run(node, self.dense)

    def _from_base(self, node: fx.Node) -> Any:
        """The value by what differs from the base, None where there is no such way."""
        if node.target is mask_channels:
            return self._masked(node)
        inputs = self.operations.inputs[node]
        states = [self.values.get(source) for source in inputs]
        if len(inputs) == 1 and node.op != "call_module" and operation(node) in _SLICED:
            return self._on_channels(node, states[0])
        if node in self.operations.sums:
            return self._sum(node, inputs, states)
        if type(self.operations.modules[node]) is nn.Conv2d:  # not one with a forward of its own
            return self._convolved(node, states[0])
        return None

    def _masked(self, node: fx.Node) -> SomeChannels | None:
        source, mask = self.operations.inputs[node][:2]
        channels = self.differing.get(mask)
        if node.args[2:] not in ((), (1,)) or source in self.dirty or source not in self.base or channels is None:
            return None
        number = self.inputs.index(mask) - 1
        layer, fill = self.neurons.layers[number], self.plan.fills[number]
        if len(channels) > FEW * layer.size:
            return None
        values = self.dense(source)
        kept_before = torch.from_numpy(self.base_mask[layer.neurons][channels].astype(np.float32))
        index = torch.from_numpy(channels).to(values.device)
        differing = select(values, 1, index)
        shape = (-1, *[1] * (differing.ndim - 2))
        kept_before = kept_before.to(values).view(shape)
        before, now = differing * kept_before, differing * (1 - kept_before)
        if fill is not None:
            constants = fill[index].to(values).view(shape)
            before, now = before + constants * (1 - kept_before), now + constants * kept_before
        return SomeChannels(layer.size, index, before, now)

    def _on_channels(self, node: fx.Node, state: Any) -> SomeChannels | None:
        if not isinstance(state, SomeChannels):
            return None
        (source,) = self.operations.inputs[node]

        def on(values: Tensor) -> Tensor:
            return self.operations.run(node, lambda read: values if read is source else self.dense(read))

        return SomeChannels(state.size, state.channels, on(state.before), on(state.now))

    def _sum(self, node: fx.Node, inputs: tuple[fx.Node, ...], states: list[Any]) -> Any:
        for (state, source), other in zip(zip(states, inputs, strict=True), reversed(inputs), strict=True):
            if other in self.dirty or other is source:
                continue
            if isinstance(state, _Shifted):
                return self.base[node] + state.by if node in self.base else state
            if isinstance(state, SomeChannels):
                beside = self.dense(other)
                if not isinstance(beside, Tensor) or beside.ndim != state.now.ndim:
                    return None
                if beside.shape[1] != state.size or beside.shape[2:] != state.now.shape[2:]:
                    return None
                beside = select(beside, 1, state.channels)
                return SomeChannels(state.size, state.channels, state.before + beside, state.now + beside)
        return None

    def _convolved(self, node: fx.Node, state: Any) -> Any:
        module = self.operations.modules[node]
        if not isinstance(state, SomeChannels) or not isinstance(module, nn.Conv2d) or module.groups > 1:
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


#: What may be done to some channels of a map alone: neither their number nor their places matter.
_SLICED = frozenset({
    "relu", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "elu", "tanh", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
})  # fmt: skip
