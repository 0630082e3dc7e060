"""Batch normalisations folded into the convolutions before them: the same function in fewer operations."""

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..neurons.channels import module_of


@torch.no_grad()
def fold_norms(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a traced network without the batch normalisations that alone read a convolution.

    The weights are combined in float64; outputs are the same up to rounding. The graph keeps the masks of the neurons,
    which then multiply what the convolutions give.
    """
    folded = copy.deepcopy(graph_module)
    calls = Counter(id(module_of(folded, node)) for node in folded.graph.nodes if node.op == "call_module")
    for node in list(folded.graph.nodes):
        norm = module_of(folded, node)
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None or _is_special(norm):
            continue
        before = node.all_input_nodes[0]
        conv = module_of(folded, before)
        if not isinstance(conv, nn.Conv1d | nn.Conv2d) or len(before.users) > 1 or _is_special(conv):
            continue
        if calls[id(norm)] > 1 or calls[id(conv)] > 1:  # a layer that is used several times has one weight
            continue
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight.double(),
            None if conv.bias is None else conv.bias.double(),
            norm.running_mean.double(),
            norm.running_var.double(),
            norm.eps,
            None if norm.weight is None else norm.weight.double(),
            None if norm.bias is None else norm.bias.double(),
        )
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        node.replace_all_uses_with(before)
        folded.graph.erase_node(node)
    folded.recompile()
    return folded


def _is_special(module: nn.Module) -> bool:
    """Whether the layer is of a class of its own, whose forward may do more."""
    return type(module) not in (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
