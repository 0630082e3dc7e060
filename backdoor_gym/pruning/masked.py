"""A network under changing masks, on fixed images: only what lies behind a changed neuron is computed again."""

from collections.abc import Iterable
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

from ..devices import find_device
from .channels import mask_channels
from .neurons import Neurons

#: Upper bound of the activations kept between calls, in bytes: of the whole network, of the base and of the last mask
#: together. The largest are given up first.
KEPT_BYTES = 1 << 30


class MaskedNetwork:
    """Logits of some images under any mask, exactly those of the network with the mask written into its weights.

    The activations of one mask, the *base*, are kept: those that a mask multiplies and those that several operations
    read. ``logits(mask)`` computes only what differs from the base; ``keep()`` makes the last mask the new base.

    Args:
        neurons: of the network.
        images: float32 (n, C, H, W) in [0, 1].
        device: where to compute.
        kept_bytes: bound of the kept activations.
    """

    def __init__(
        self, neurons: Neurons, images: Tensor, device: str | torch.device = "cpu", kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.neurons = neurons
        self.device = find_device(device)
        self._interpreter = fx.Interpreter(
            neurons.graph.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        )
        self._nodes = list(neurons.graph.graph.nodes)
        self._order = {node: position for position, node in enumerate(self._nodes)}
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._behind = _behind(self._nodes)
        images = images.to(self.device, memory_format=torch.channels_last)
        self._kept_nodes = self._choose_kept(images, kept_bytes)
        self._base: dict[fx.Node, Any] = {self._inputs[0]: images}
        self._base_mask = np.ones(len(neurons), dtype=bool)
        self._pending: dict[fx.Node, Any] = {}
        self._evaluate(self._base_mask, set(self._nodes))
        self.keep()
        self._whole = self._base

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
        changed = [
            layer
            for layer in range(len(self.neurons.layers))
            if not np.array_equal(
                mask[self.neurons.layers[layer].neurons], self._base_mask[self.neurons.layers[layer].neurons]
            )
        ]
        dirty: set[fx.Node] = set().union(*(self._behind[self._inputs[1 + layer]] for layer in changed))
        return self._evaluate(mask, dirty)

    def keep(self) -> None:
        """Make the mask that ``logits`` was last called with the base."""
        self._base, self._base_mask = {**self._base, **self._pending}, self._pending_mask
        self._pending = {}

    @torch.no_grad()
    def _evaluate(self, mask: np.ndarray, dirty: set[fx.Node]) -> Tensor:
        masks = dict(zip(self._inputs[1:], self.neurons.layer_masks(mask, self.device), strict=True))
        output = self._nodes[-1]
        self._pending_mask = mask.copy()
        self._pending = {}
        values: dict[fx.Node, Any] = {**masks}
        plan = self._plan(output, dirty)
        last_use = {source: node for node in plan for source in node.all_input_nodes}
        for node in plan:
            for source in node.all_input_nodes:
                if source not in values:
                    values[source] = self._base[source]
            arguments = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = getattr(self._interpreter, node.op)(node.target, *arguments)
            if node in self._kept_nodes and node in dirty:
                self._pending[node] = values[node]
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    del values[source]
        return values[output] if output in values else self._base[output]

    def _plan(self, output: fx.Node, dirty: set[fx.Node]) -> list[fx.Node]:
        """The operations to run, in order: from what is kept and not behind a change to the output."""
        needed: set[fx.Node] = set()
        front = [output]
        while front:
            node = front.pop()
            if node in needed or node.op == "placeholder" or (node not in dirty and node in self._base):
                continue
            needed.add(node)
            front.extend(node.all_input_nodes)
        return sorted(needed, key=self._order.__getitem__)

    def _choose_kept(self, images: Tensor, kept_bytes: int) -> set[fx.Node]:
        """The largest activations are given up where all of them would not fit."""
        sizes = _Sizes(self._interpreter.module)
        sizes.run(images[:1])
        candidates = {
            node
            for node in self._nodes
            if node.op == "output"
            or (node.op not in ("placeholder", "get_attr") and len(node.users) > 1)
            or any(user.target is mask_channels and user.args[0] is node for user in node.users)
        }
        kept: set[fx.Node] = set()
        total = 0
        for node in sorted(candidates, key=lambda node: sizes.bytes.get(node, 0)):
            total += sizes.bytes.get(node, 0) * len(images)
            if 3 * total > kept_bytes:
                break
            kept.add(node)
        return kept


class _Sizes(fx.Interpreter):
    """Bytes of each value for one image."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.bytes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            self.bytes[n] = value.numel() * value.element_size()
        return value


def _behind(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The nodes that depend on each node, itself left out."""
    behind: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(list(nodes)):
        behind[node] = set(node.users).union(*(behind[user] for user in node.users))
    return behind
