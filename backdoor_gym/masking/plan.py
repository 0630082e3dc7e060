"""What all evaluations of a network under masks have in common, whatever the images and the mask."""

from collections.abc import Iterable
from copy import deepcopy
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import DataError
from ..networks.preprocessing import Preprocess
from ..neurons.channels import mask_channels, module_of
from ..neurons.finding import Neurons
from .folding import fold_norms
from .operations import Operations
from .sizes import Sizes


class Structure:
    """A traced network as masked evaluations need it: with its normalisations folded, channels last, looked up once.

    Args:
        neurons: of the network.
        image: one that it takes, float32 (1, C, H, W).
        device: where it runs.
        kept_bytes: bound of the activations of an image that are kept, in bytes.
        dtype: of weights and activations, float32 or bfloat16.

    Raises:
        DataError: the network cannot be run in bfloat16.

    Attributes:
        graph: the traced network, with masks among its inputs. It takes float32 images in any case.
        exact: the same in float32.
        operations: of the graph.
        sizes: of its values.
        at_once: of how many images a pass is.
        nodes: in order.
        order: position of each node.
        inputs: that of the images, then the masks of the layers.
        behind: the nodes that depend on each node, itself left out.
        kept: nodes whose values are kept: what a mask multiplies, the smallest first, then what several operations read,
            as far as there is room, and the logits.
    """

    def __init__(
        self, neurons: Neurons, image: Tensor, device: torch.device, kept_bytes: float, dtype: torch.dtype
    ) -> None:
        self.neurons, self.device, self.dtype = neurons, device, dtype
        self.exact = _folded(neurons, torch.float32)
        self.graph = _folded(neurons, dtype)
        for graph in (self.exact, self.graph):
            graph.to(device)
            for parameter in graph.parameters():
                if parameter.ndim == 4:  # of other constants some may have five dimensions
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.operations = Operations(self.graph)
        self.nodes = self.operations.nodes
        self.order = {node: position for position, node in enumerate(self.nodes)}
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.behind = _behind(self.nodes)
        try:
            self.sizes = Sizes(self.graph, image.to(device))
        except Exception as error:  # a network's own operations can raise anything on what they were not made for
            if dtype == torch.float32:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f'this network cannot be run in bfloat16 ({reason}); use precision="float32"') from error
        self.at_once = max(1, self.sizes.images_at_once * dtype.itemsize // 4)  # some may be computed again in float32
        self.kept = self._choose_kept(kept_bytes)

    @property
    def output(self) -> fx.Node:
        """The logits."""
        return self.nodes[-1]

    def masks(self, mask: np.ndarray) -> list[Tensor | None]:
        """``Neurons.layer_masks`` of this device and dtype."""
        masks = self.neurons.layer_masks(mask, self.device)
        return [None if one is None else one.to(self.dtype) for one in masks]

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


#: What is folded of each network, by dtype, for as long as the network is used.
_FOLDED: WeakKeyDictionary[Neurons, dict[torch.dtype, fx.GraphModule]] = WeakKeyDictionary()


def _folded(neurons: Neurons, dtype: torch.dtype) -> fx.GraphModule:
    folded = _FOLDED.setdefault(neurons, {})
    if not folded:
        folded[torch.float32] = fold_norms(neurons.graph)
    if dtype not in folded:
        folded[dtype] = _converted(folded[torch.float32], dtype)
    return folded[dtype]


def _converted(exact: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """The network in another dtype, behind images, and what they are made of first, in float32."""
    converted = deepcopy(exact).to(dtype)
    images = next(iter(converted.graph.nodes))
    front = next((user for user in images.users if isinstance(module_of(converted, user), Preprocess)), images)
    if front is not images:
        module_of(converted, front).function = module_of(exact, front).function  # type: ignore[union-attr]
    with converted.graph.inserting_after(front):
        inside = converted.graph.call_method("to", (front, dtype))
    front.replace_all_uses_with(inside, lambda user: user is not inside)
    converted.recompile()
    return converted


def _behind(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The nodes that depend on each node, itself left out."""
    behind: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(list(nodes)):
        behind[node] = set(node.users).union(*(behind[user] for user in node.users))
    return behind
