"""The backward pass by hand: derivatives by the masks of neurons from activations that are kept already.

Only the masks' derivatives are wanted, so of each convolution only that by its input is computed, and of values only what a
derivative needs: the input of each mask, and where a ReLU is open. What is not kept of them is computed from what is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..neurons.channels import Filled, Mask, along_channels, mask_channels
from .memory_format import in_order_of
from .operations import Operations


class Kept(Protocol):
    """Kept values by node; that of the images is always there."""

    def __contains__(self, node: object) -> bool: ...

    def __getitem__(self, node: fx.Node) -> Any: ...


def mask_derivatives(
    operations: Operations,
    kept: Kept,
    masks: dict[fx.Node, Mask],
    gradient: Tensor,
) -> dict[fx.Node, Tensor]:
    """Derivative of a quantity of the logits by the mask of each layer, float32 (channels,); none where it has no part.

    Args:
        operations: of the traced network, with masks among its inputs.
        kept: values under these masks, by node.
        masks: the mask of each layer, in network order; None where nothing is pruned.
        gradient: the derivative by the logits (n, classes), of their dtype in the pass.
    """
    return _Backward(operations, kept, masks).run(gradient)


def by_logits(quantity: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Derivative of a quantity of logits (n, classes) by them, float32 (n, classes)."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(quantity(leaf), [leaf])
    return gradient


def by_autograd(
    graph: fx.GraphModule,
    images: Tensor,
    masks: Sequence[Mask],
    sizes: Sequence[int],
    quantity: Callable[[Tensor], Tensor],
) -> Tensor:
    """The same by whole passes, (neurons,) of the masks' dtype, for networks in which an operation gives several tensors.

    Args:
        graph: the traced network, with masks among its inputs.
        images: float32 (n, C, H, W).
        masks: of each layer; None where nothing is pruned.
        sizes: of the layers.
        quantity: from logits (n, classes) to a scalar.
    """
    plain = [mask.mask if isinstance(mask, Filled) else mask for mask in masks]
    leaves = [
        (images.new_ones(size) if mask is None else mask.clone()).requires_grad_()
        for mask, size in zip(plain, sizes, strict=True)
    ]
    read = [
        Filled(leaf, mask.fill) if isinstance(mask, Filled) else leaf for leaf, mask in zip(leaves, masks, strict=True)
    ]
    with torch.enable_grad():
        value = quantity(graph(images, *read))
        # An answer that only looks at which value is the largest has no derivative.
        by_mask = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    return torch.cat([torch.zeros_like(leaf) if by is None else by for leaf, by in zip(leaves, by_mask, strict=True)])


class _Backward:
    def __init__(self, operations: Operations, kept: Kept, masks: dict[fx.Node, Mask]) -> None:
        self.operations, self.kept, self.masks = operations, kept, masks
        self.values: dict[fx.Node, Any] = {**masks}
        self.gradients: dict[fx.Node, Tensor] = {}
        #: Tensors that have a mask before them: only there a gradient is needed.
        self.behind_masks = operations.behind_masks

    def run(self, of_logits: Tensor) -> dict[fx.Node, Tensor]:
        """The derivatives by each mask, from that by the logits."""
        (answer,) = self.operations.inputs[self.operations.nodes[-1]]
        self.gradients[answer] = of_logits
        by_mask: dict[fx.Node, Tensor] = {}
        with torch.no_grad():
            for node in reversed(self.operations.nodes):
                gradient = self.gradients.pop(node, None)
                if gradient is not None and node.target is mask_channels:
                    mask, here = self._through_mask(node, gradient)
                    by_mask[mask] = by_mask[mask] + here if mask in by_mask else here
                elif gradient is not None:
                    self._through(node, gradient)
                self.values.pop(node, None)  # nothing that comes needs it
        return by_mask

    def value(self, node: fx.Node) -> Any:
        """Of a node, kept or computed from what is."""
        open_nodes = [node]  # not by recursion: deep networks of which little is kept would exceed its limit
        while open_nodes:
            last = open_nodes[-1]
            sources = [] if last in self.kept else self.operations.inputs[last]
            missing = [source for source in sources if source not in self.values]
            if last in self.values or not missing:
                open_nodes.pop()
                if last not in self.values:
                    self.values[last] = self.kept[last] if last in self.kept else self._operate(last)
            else:
                open_nodes.extend(missing)
        return self.values[node]

    @torch.no_grad()
    def _operate(self, node: fx.Node) -> Any:
        return self.operations.run(node, self.values.__getitem__)

    def _add(self, node: fx.Node, gradient: Tensor) -> None:
        if node in self.behind_masks:
            self.gradients[node] = self.gradients[node] + gradient if node in self.gradients else gradient

    def _through_mask(self, node: fx.Node, gradient: Tensor) -> tuple[fx.Node, Tensor]:
        source, mask, *rest = self.operations.inputs[node]
        values = self.value(source)
        axis: Any = node.args[2] if len(node.args) > 2 else 1
        units = self.value(rest[0]) if rest else None
        kept = self.masks[mask]
        if isinstance(kept, Filled):  # what a mask takes away is the difference from the constant
            values = values - along_channels(kept.fill, values.ndim, axis)
            kept = kept.mask
        if source in self.behind_masks:
            self._add(source, mask_channels(gradient, kept, axis, units))
        others = [other for other in range(values.ndim) if other != axis % values.ndim]
        derivative = (gradient * values).sum(others, dtype=torch.float32)
        if units is not None:
            inside = units >= 0
            derivative = derivative.new_zeros(mask.meta["size"]).index_add(0, units[inside], derivative[inside])
        return mask, derivative

    def _through(self, node: fx.Node, gradient: Tensor) -> None:
        module, inputs = self.operations.modules[node], self.operations.inputs[node]
        if self._is_relu(node):
            known = node if node in self.kept or node in self.values else inputs[0]
            # ReLU's own operation: a comparison and a fill take longer than a convolution.
            values = self.value(known)
            self._add(inputs[0], torch.ops.aten.threshold_backward(in_order_of(gradient, values), values, 0))
        elif (
            isinstance(module, nn.Conv2d)
            and type(module) is nn.Conv2d
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        ):
            if inputs[0] in self.behind_masks:
                self._add(inputs[0], _conv_input_gradient(module, gradient, self._size(inputs[0])))
        elif node in self.operations.sums:
            for source in inputs:
                if source in self.behind_masks:
                    self._add(source, gradient.sum_to_size(self.value(source).shape))
        else:
            self._through_any(node, gradient)

    def _is_relu(self, node: fx.Node) -> bool:
        return node.op != "call_module" and node.target in (F.relu, torch.relu, "relu")

    def _size(self, node: fx.Node) -> torch.Size:
        """Height and width of a value; masks and ReLUs change neither, so that it need not be computed."""
        while node not in self.values and node not in self.kept:
            if node.target is not mask_channels and not self._is_relu(node):
                break
            node = self.operations.inputs[node][0]
        return self.value(node).shape[2:]

    def _through_any(self, node: fx.Node, gradient: Tensor) -> None:
        """By autograd, which takes the operation a second time."""
        read = [source for source in self.operations.inputs[node] if source in self.behind_masks]
        leaves = {
            source: self.value(source).detach().requires_grad_()
            for source in read
            if _has_derivative(self.value(source))
        }
        with torch.enable_grad():
            result = self.operations.run(
                node, lambda source: leaves[source] if source in leaves else self.value(source)
            )
            if not result.requires_grad:  # it looked at their shape alone
                return
            gradients = torch.autograd.grad(result, list(leaves.values()), gradient.to(result.dtype), allow_unused=True)
        for source, by_source in zip(leaves, gradients, strict=True):
            if by_source is not None:
                self._add(source, by_source)


def _has_derivative(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _conv_input_gradient(conv: nn.Conv2d, gradient: Tensor, size: torch.Size) -> Tensor:
    """Of a convolution with zero padding, by its input of that height and width: the transposed convolution."""
    assert not isinstance(conv.padding, str)
    rest = [
        whole - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for whole, out, stride, padding, dilation, kernel in zip(
            size, gradient.shape[2:], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True
        )
    ]
    return F.conv_transpose2d(
        gradient, conv.weight, None, conv.stride, conv.padding, tuple(rest), conv.groups, conv.dilation
    )
