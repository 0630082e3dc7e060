"""How large the values of a pass are, and so of how many images one should be."""

from typing import Any

import torch
from torch import Tensor, fx

#: Size of all values of a pass, one after the other, up to which its images are computed at once: with more of them little is
#: gained, and large values do not fit into the memory that others gave back.
PASS_BYTES = 256 << 20


class Sizes(fx.Interpreter):
    """What a pass of one image shows of each value.

    Args:
        graph: the traced network, with masks among its inputs.
        image: float32 (1, C, H, W).

    Attributes:
        bytes: of an image's value, by node.
        batched: nodes whose first axis is that of the images.
        several: whether some node gives several tensors.
    """

    def __init__(self, graph: fx.GraphModule, image: Tensor) -> None:
        super().__init__(graph)
        self.bytes: dict[fx.Node, int] = {}
        self.batched: set[fx.Node] = set()
        self.several = False
        self.run(image)

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

    @property
    def image_bytes(self) -> int:
        """Size of all values of a pass of one image."""
        return sum(self.bytes.values())

    @property
    def images_at_once(self) -> int:
        """Of how many images a pass should be."""
        return max(1, PASS_BYTES // max(1, self.image_bytes))
