"""The operations of a traced network, looked up once instead of in every pass."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..neurons.channels import mask_channels, module_of
from ..neurons.joining import is_number


class Operations:
    """What ``torch.fx.Interpreter`` finds out at every node of every pass.

    Args:
        graph_module: the traced network, whose modules stay the same; their weights may change.

    Attributes:
        nodes: in order.
        inputs: the nodes that each node reads.
        modules: that each node calls, None where it calls none.
        sums: nodes that add two values, and do nothing else.
        behind_masks: nodes whose value is a tensor that has a mask before it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.inputs = {node: tuple(node.all_input_nodes) for node in self.nodes}
        self.modules: dict[fx.Node, nn.Module | None] = {node: module_of(graph_module, node) for node in self.nodes}
        self.sums = {
            node
            for node in self.nodes
            if node.target in (operator.add, torch.add) and not node.kwargs and node.args == self.inputs[node]
        }
        self.behind_masks: set[fx.Node] = set()
        for node in self.nodes:
            behind = node.target is mask_channels or any(source in self.behind_masks for source in self.inputs[node])
            if behind and not is_number(node):
                self.behind_masks.add(node)
        #: Nodes whose arguments are what they read, and nothing else.
        self._plain = {node for node in self.nodes if not node.kwargs and node.args == self.inputs[node]}
        self._interpreter = fx.Interpreter(graph_module)

    def run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """The value of a node from those of the nodes that it reads."""
        if node in self._plain:
            arguments: tuple[Any, ...] = tuple(map(value, self.inputs[node]))
            options: dict[str, Any] = {}
        else:
            arguments, options = fx.node.map_arg((node.args, node.kwargs), value)
        module = self.modules[node]
        if module is not None:
            return module(*arguments, **options)
        if node.op == "call_function":
            target: Any = node.target
            return target(*arguments, **options)
        return getattr(self._interpreter, node.op)(node.target, arguments, options)
