"""What all evaluations of a network under masks have in common, whatever the images and the mask."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx

from ..neurons.channels import Mask, filled, mask_channels
from ..neurons.layers import Neurons
from .folding import fold_norms
from .operations import Operations
from .sizes import Sizes


class Plan:
    """A traced network as masked evaluations need it: with its normalisations folded, channels last, looked up once.

    Args:
        neurons: of the network.
        image: one that it takes, float32 (1, C, H, W).
        device: where it runs.
        kept_bytes: bound of the activations of an image that are kept, in bytes.
        fill: what each neuron gives where it is pruned, float32 (neurons,); None for zeros.

    Attributes:
        graph: the traced network, with masks among its inputs.
        operations: of the graph.
        sizes: of its values.
        at_once: of how many images a pass is.
        nodes: in order.
        order: position of each node.
        inputs: that of the images, then the masks of the layers.
        behind: the nodes that depend on each node, itself left out.
        kept: nodes whose values are kept: what a mask multiplies, the smallest first, then what several operations read,
            as far as there is room, and the logits.
        fills: what the neurons of each layer give where they are pruned, (size,); None for zeros.
    """

    def __init__(
        self,
        neurons: Neurons,
        image: Tensor,
        device: torch.device,
        kept_bytes: float,
        fill: Tensor | None = None,
    ) -> None:
        self.neurons, self.device = neurons, device
        self.fills = neurons.layer_fills(fill, device)
        self.graph = _folded(neurons).to(device)
        for parameter in self.graph.parameters():
            if parameter.ndim == 4:  # of other constants some may have five dimensions
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.operations = Operations(self.graph)
        self.nodes = self.operations.nodes
        self.order = {node: position for position, node in enumerate(self.nodes)}
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.behind = _behind(self.nodes)
        self.sizes = Sizes(self.graph, image.to(device))
        self.at_once = self.sizes.images_at_once
        self.kept = self._choose_kept(kept_bytes)

    @property
    def output(self) -> fx.Node:
        """The logits."""
        return self.nodes[-1]

    def masks(self, mask: np.ndarray) -> list[Mask]:
        """A mask of all neurons, bool (neurons,), True where kept, as the masks of the layers."""
        return filled(self.neurons.layer_masks(mask, self.device), self.fills)

    def _choose_kept(self, kept_bytes: float) -> set[fx.Node]:
        masked = {node.all_input_nodes[0] for node in self.nodes if node.target is mask_channels}
        candidates = {
            node
            for node in self.nodes
            if node.op == "output" or (node.op not in ("placeholder", "get_attr") and len(node.users) > 1)
        } | masked
        kept: set[fx.Node] = set()
        total = 0
        for node in sorted(candidates, key=lambda node: (node not in masked, self.sizes.bytes.get(node, 0))):
            size = self.sizes.bytes.get(node, 0)
            if total + size > kept_bytes and node.op != "output":
                continue
            total += size
            kept.add(node)
        return kept


#: What is folded of each network, for as long as the network is used.
_FOLDED: WeakKeyDictionary[Neurons, fx.GraphModule] = WeakKeyDictionary()


def _folded(neurons: Neurons) -> fx.GraphModule:
    if neurons not in _FOLDED:
        _FOLDED[neurons] = fold_norms(neurons.graph)
    return _FOLDED[neurons]


def _behind(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The nodes that depend on each node, itself left out."""
    behind: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(list(nodes)):
        behind[node] = set(node.users).union(*(behind[user] for user in node.users))
    return behind
