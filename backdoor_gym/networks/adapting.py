"""Other people's modules as what this package takes: one that gives a tensor of logits, in float32."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

#: Classes that hold a network and call it, and the attribute that it is in.
_WRAPPERS = {
    "DataParallel": "module", "DistributedDataParallel": "module", "FullyShardedDataParallel": "module",
    "AveragedModel": "module", "OptimizedModule": "_orig_mod",
}  # fmt: skip
#: Where logits are in an answer of several parts, the likelier first.
LOGITS = ("logits", "out", "output", "prediction")


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``torch.compile`` and the like, and of a Lightning module without a forward.

    Raises:
        DataError: TorchScript, or a Lightning module of which it is not clear which part is the network.
    """
    while True:
        if isinstance(module, torch.jit.ScriptModule):
            raise DataError(
                "the network is TorchScript, which does not show its layers; give the Python module that it was made from, and "
                "load its state dict"
            )
        kinds = [kind.__name__ for kind in type(module).__mro__]
        attribute = next((_WRAPPERS[kind] for kind in _WRAPPERS if kind in kinds), "")
        inside = getattr(module, attribute, None)
        if isinstance(inside, nn.Module):
            module = inside
        elif "LightningModule" in kinds and not _defines_forward(module):
            parts = [child for child in module.children() if next(child.parameters(), None) is not None]
            if len(parts) != 1:
                raise DataError(
                    f"{type(module).__name__} has no forward and {len(parts)} parts with weights; give the part that is the "
                    "classifier"
                )
            module = parts[0]
        else:
            return module


def _defines_forward(module: nn.Module) -> bool:
    """Whether a Lightning module has a forward of its own, not Lightning's."""
    for kind in type(module).__mro__:
        if kind.__name__ == "LightningModule":
            return False
        if "forward" in vars(kind):
            return True
    return False


def find_logits(answer: Any, classes: int = 1) -> str | int | None:
    """Which entry of an answer of several parts the logits are, None where the answer is a tensor itself.

    It is the first attribute or key of ``LOGITS``, or else the narrowest tensor (n, m) with m of at least ``classes``, as
    features are wider as a rule.

    Raises:
        DataError: there is no such.
    """
    if isinstance(answer, Tensor):
        return None
    for name in LOGITS:
        if isinstance(answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None), Tensor):
            return name
    parts: Any = answer.items() if isinstance(answer, Mapping) else ()
    if isinstance(answer, tuple | list):
        parts = enumerate(answer)
    widths = {key: part.shape[1] for key, part in parts if isinstance(part, Tensor) and part.ndim == 2}
    fitting = [key for key, width in widths.items() if width >= classes]
    if fitting:
        return min(fitting, key=lambda key: widths[key])
    raise DataError(
        f"the network must give logits (n, classes), or an answer with an entry {LOGITS[0]!r} or a tensor of that form, not "
        f"{type(answer).__name__}"
    )


def pick_logits(answer: Any, entry: str | int | None) -> Tensor:
    """The logits (n, classes) of an answer; those of a map of one pixel (n, classes, 1, 1) too."""
    if entry is not None:
        by_key = isinstance(answer, Mapping) or isinstance(entry, int)
        answer = answer[entry] if by_key else getattr(answer, str(entry))
    return answer.flatten(1) if answer.ndim > 2 and answer[0].numel() == answer.shape[1] else answer


def deep_copy(network: nn.Module) -> nn.Module:
    """A deep copy; what cannot be copied in attributes (kept activations, locks, files, generators) is shared."""
    with suppress(Exception):  # whatever the attributes of the user's modules raise
        return copy.deepcopy(network)
    memo: dict[int, Any] = {}
    for module in network.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    memo[id(value)] = value
    return copy.deepcopy(network, memo)


def in_float32(network: nn.Module) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """The network, or a copy in float32 where some of its weights are of another type, and which these were."""
    dtypes = {
        name: value.dtype
        for name, value in network.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32
    }
    return (deep_copy(network).float(), dtypes) if dtypes else (network, dtypes)


def in_own_types(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """The network, or a copy with weights of these types."""
    if not dtypes:
        return network
    network = deep_copy(network)
    for name, module in network.named_modules():
        for own in (module._parameters, module._buffers):
            for key, value in own.items():
                dtype = dtypes.get(f"{name}.{key}" if name else key)
                if dtype is not None and value is not None:
                    value.data = value.data.to(dtype)
    return network
