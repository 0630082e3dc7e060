"""A network under changing masks, on fixed images: only what a changed neuron changes is computed again."""

from collections.abc import Callable
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

from ..devices import find_device
from ..neurons.layers import Neurons
from .backward import Kept, by_autograd, by_logits, mask_derivatives
from .incremental import Evaluation, SomeChannels
from .memory_format import select
from .plan import Plan

#: Upper bound of the activations kept between calls, in bytes: of the whole network, of the base and of the last mask
#: together. What is given up first is what costs least to compute again.
KEPT_BYTES = 1 << 30


class MaskedNetwork:
    """Logits of some images under any mask: up to rounding those of the network with the mask written into its weights.

    A pruned neuron gives zero, or its constant of ``fill``, as ``write_mask`` writes it.

    The activations of one mask, the *base*, are kept: those that a mask multiplies and those that several operations
    read. ``logits(mask)`` computes only what differs from the base; ``keep()`` makes the last mask the new base. A large
    network computes some of the images after the others.

    Args:
        neurons: of the network.
        images: float32 (n, C, H, W) in [0, 1].
        device: where to compute.
        kept_bytes: bound of the kept activations.
        fill: what each neuron gives where it is pruned (``fill.fill_values``), float32 (neurons,); None for zeros.
    """

    def __init__(
        self,
        neurons: Neurons,
        images: Tensor,
        device: str | torch.device = "cpu",
        kept_bytes: int = KEPT_BYTES,
        fill: Tensor | None = None,
    ) -> None:
        _let_memory_stay()
        self.neurons = neurons
        self.device = find_device(device)
        kept = kept_bytes / (3 * max(1, len(images)))
        self._plan = Plan(neurons, images[:1], self.device, kept, fill)
        self._parts = [_Part(self._plan, batch) for batch in images.split(self._plan.at_once)]
        self._starts = [0, *np.cumsum([len(part) for part in self._parts]).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def pass_bytes(self) -> int:
        """Size of all values of a pass of the images, one after the other, in bytes."""
        return len(self) * self._plan.sizes.image_bytes

    def reset(self) -> None:
        """Make "nothing pruned" the base."""
        for part in self._parts:
            part.reset()

    def fork(self) -> Self:
        """The same images under masks of its own; the activations of the whole network are shared."""
        twin = copy(self)
        twin._parts = [part.fork() for part in self._parts]
        return twin

    def logits(self, mask: np.ndarray) -> Tensor:
        """Logits (n, classes) under the mask, bool (neurons,), True where kept; asked twice in a row, computed once."""
        return _together([part.logits(mask) for part in self._parts])

    def keep(self) -> None:
        """Make the mask that ``logits`` was last called with the base."""
        for part in self._parts:
            part.keep()

    def mask_gradient(
        self, mask: np.ndarray, quantity: Callable[[Tensor], Tensor], rows: Tensor | None = None
    ) -> Tensor:
        """Derivative of a quantity of the logits by each neuron's mask, float32 (neurons,), where the mask is the base.

        That is, to first order, what pruning the neuron takes away: (value - fill) times the derivative by the value, summed.
        What is kept saves the forward pass. The mask becomes the base.

        Args:
            mask: where the derivative is taken, bool (neurons,), True where kept.
            quantity: from logits (n, classes) to a scalar.
            rows: which images, int64 (n,) from 0 on; None for all.
        """
        if not np.array_equal(mask, self._parts[0].base_mask):
            self.logits(mask)
            self.keep()
        logits = _together([part.base_logits for part in self._parts])
        if rows is not None:
            rows = rows.to(self.device)
            logits = logits[rows]
        gradient = by_logits(quantity, logits)
        derivative = torch.zeros(len(self.neurons), device=self.device)
        for start, part in zip(self._starts, self._parts, strict=False):
            if rows is None:
                derivative += part.mask_gradient(gradient[start : start + len(part)])
                continue
            here = (rows >= start) & (rows < start + len(part))
            if here.any():
                derivative += part.mask_gradient(gradient[here], rows[here] - start)
        return derivative


class _Part:
    """Some of the images, which are computed at once."""

    def __init__(self, plan: Plan, images: Tensor) -> None:
        self._plan = plan
        self._images = images.to(plan.device, memory_format=torch.channels_last)
        self._base: dict[fx.Node, Any] = {plan.inputs[0]: self._images}
        self.base_mask = np.ones(len(plan.neurons), dtype=bool)
        self._base |= self._evaluate(self.base_mask)
        self._whole = self._base
        self.reset()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def base_logits(self) -> Tensor:
        """Logits (n, classes) under the mask of the base."""
        return self._base[self._plan.output]

    def reset(self) -> None:
        self._base, self.base_mask = self._whole, np.ones(len(self._plan.neurons), dtype=bool)
        self._pending: dict[fx.Node, Any] = {}
        self._pending_mask = self.base_mask

    def fork(self) -> Self:
        twin = copy(self)
        twin.reset()
        return twin

    def logits(self, mask: np.ndarray) -> Tensor:
        if not np.array_equal(mask, self._pending_mask):
            self._pending = self._evaluate(mask)
            self._pending_mask = mask.copy()
        output = self._plan.output
        return self._pending[output] if output in self._pending else self._base[output]

    def keep(self) -> None:
        settled = {
            node: value.within(self._base[node]) if isinstance(value, SomeChannels) else value
            for node, value in self._pending.items()
        }
        self._base, self.base_mask = {**self._base, **settled}, self._pending_mask
        self._pending = {}

    def mask_gradient(self, gradient: Tensor, rows: Tensor | None = None) -> Tensor:
        """By each neuron's mask, float32 (neurons,), from that by the logits of the images, or of some of them."""
        plan = self._plan
        layers, images = plan.neurons.layers, plan.inputs[0]
        masks = plan.masks(self.base_mask)
        if plan.sizes.several:
            read = self._base[images] if rows is None else self._base[images][rows]
            sizes = [layer.size for layer in layers]
            return by_autograd(plan.graph, read, masks, sizes, lambda logits: (logits * gradient).sum())
        kept: Kept = self._base
        if rows is not None:
            of_images = {images} | (plan.behind[images] & plan.sizes.batched)
            kept = _Rows(self._base, rows, of_images)
        named = dict(zip(plan.inputs[1:], masks, strict=True))
        by_mask = mask_derivatives(plan.operations, kept, named, gradient)
        return torch.cat(
            [
                by_mask[mask] if mask in by_mask else torch.zeros(layer.size, device=plan.device)
                for mask, layer in zip(plan.inputs[1:], layers, strict=True)
            ]
        )

    @torch.no_grad()
    def _evaluate(self, mask: np.ndarray) -> dict[fx.Node, Any]:
        plan = self._plan
        return Evaluation(plan, self._base, self.base_mask, mask).run()


class _Rows:
    """Some images of kept activations."""

    def __init__(self, values: dict[fx.Node, Any], rows: Tensor, batched: set[fx.Node]) -> None:
        self._values, self._rows, self._batched = values, rows, batched

    def __contains__(self, node: object) -> bool:
        return node in self._values and node in self._batched

    def __getitem__(self, node: fx.Node) -> Tensor:
        return select(self._values[node], 0, self._rows)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _let_memory_stay() -> None:
    """Where the C library is glibc: let it keep up to 64 MiB of freed memory, of which every operation asks for some anew.

    It otherwise gives most of it back to the system, and the next operation waits until the system has cleared it. How much
    it keeps follows from the largest piece below 32 MiB that was freed so far; this one is never written to.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)
