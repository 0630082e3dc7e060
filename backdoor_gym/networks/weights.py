"""Weights and the network that they belong to."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import WeightsError


def check_finite(network: nn.Module) -> None:
    """Raise ``WeightsError`` where a weight or a statistic is NaN or infinite, or a variance is below zero.

    A mask that is a buffer may be infinite.
    """
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if not value.is_floating_point():
            continue
        own_name = name.rpartition(".")[2]
        is_mask = not isinstance(value, nn.Parameter) and not own_name.startswith("running_")
        if torch.isnan(value).any() or not (is_mask or torch.isfinite(value).all()):
            raise WeightsError(f"the weights hold values that are not finite (first in {name})")
        if own_name == "running_var" and bool((value < 0).any()):
            raise WeightsError(f"{name} holds variances below zero: it is damaged, or was never trained")


def check_shapes(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ``WeightsError`` with one line that says in what a state dict differs from that of the network."""
    own = network.state_dict()
    problems = differences(
        missing=[key for key in own if key not in weights],
        unexpected=[key for key in weights if key not in own],
        differing=[
            f"{key}: {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in weights and weights[key].shape != value.shape
        ],
    )
    if problems:
        raise WeightsError(f"the weights are not of a {type(network).__name__} like this: {problems}")


def differences(missing: Sequence[str], unexpected: Sequence[str], differing: Sequence[str]) -> str:
    """How many tensors are so, with the names of the first three of each; "" where none is."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict of the network's own shapes and kinds of numbers.

    Raises:
        WeightsError: it is of others.
    """
    check_shapes(network, weights)
    for key, value in network.state_dict().items():
        if _kind(value) != _kind(weights[key]):
            raise WeightsError(f"the weights of {key} must be like {value.dtype}, not {weights[key].dtype}")
    network.load_state_dict(weights)


def _kind(tensor: Tensor) -> str:
    """What kind of numbers it holds."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"
