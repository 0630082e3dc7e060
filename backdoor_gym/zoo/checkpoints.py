"""Other people's checkpoints: weights out of safetensors and torch files, without running anything that came with them.

torch files are read by torch's restricted reader (``weights_only=True``). What it does not know (numpy numbers, an
``argparse.Namespace``, a pickled class, ...) is replaced by inert stand-ins of this module, and named in the result: neither
imported nor called.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import ModelFileError, WeightsError
from .files import is_pickle

#: Keys under which training code keeps the weights, the likelier first (``netC`` is the classifier beside a generator).
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "netC", "network", "weights", "params")
#: What a checkpoint may say about itself beside the weights, as BackdoorBench's do, and the type each must have.
FACTS = {"model_name": str, "num_classes": int, "clean_data": str, "img_size": list | tuple}
#: What torch's reader raises on files that it does not take.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
)
COUNTER = "num_batches_tracked"
#: Modules of a pickled network that are looked into.
MOST_MODULES = 20_000


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a file.

    Attributes:
        path: the file.
        weights: the state dict, with the file's own names.
        facts: those of ``FACTS`` that the file holds.
        unread: names of classes and functions in the file that were not touched.
    """

    path: Path
    weights: dict[str, Tensor]
    facts: dict[str, Any]
    unread: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The weights of a ``.safetensors`` or a torch file (``.pt``, ``.pth``, ``.tar``, ...); what it is, its first bytes tell.

    A torch file holds a state dict, a dict that holds one (under a key of ``WRAPPERS``, or the only one there), or a whole
    pickled network, of which only the tensors are taken.

    Raises:
        ModelFileError: missing, damaged, of another kind, without weights or with several sets of them, or one that would call
            into the operating system when read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}")
    if not is_pickle(path):
        try:
            with safe_open(str(path), framework="pt") as file:
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{path} is neither a readable safetensors file nor a torch file, or is truncated ({error})"
            ) from error
        if not weights:
            raise ModelFileError(f"{path} holds no tensor")
        return Checkpoint(path, weights, {})
    content, unread = _read_torch(path)
    facts = {}
    if isinstance(content, Mapping):
        facts = {key: content[key] for key, kind in FACTS.items() if isinstance(content.get(key), kind)}
    try:
        weights = _find_weights(path, content)
    except ModelFileError:
        raise
    except (
        RecursionError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:  # a file that holds itself, or parts of no such kind
        raise ModelFileError(f"{path} is damaged: what it holds is not put together as weights are") from error
    for name, tensor in weights.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelFileError(f"{path} is damaged: {name} is larger than what is stored of it")
    return Checkpoint(path, weights, facts, unread)


def fit_weights(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights into a network, whatever prefix (``module.``, ``model.``, ``_orig_mod.``, ...) their names have.

    Counters of batches that old files lack (``num_batches_tracked``) are left as they are.

    Raises:
        WeightsError: names missing or unexpected, or other shapes.
    """
    wanted, weights = network.state_dict(), checkpoint.weights
    prefix = max(_prefixes(weights), key=lambda prefix: (sum(prefix + key in weights for key in wanted), -len(prefix)))
    found = {key: prefix + key for key in wanted if prefix + key in weights}
    missing = [key for key in wanted if key not in found and not key.endswith(COUNTER)]
    taken = set(found.values())
    unexpected = [key for key in weights if key not in taken]
    differing = [
        f"{key} {tuple(weights[name].shape)} instead of {tuple(wanted[key].shape)}"
        for key, name in found.items()
        if weights[name].shape != wanted[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if keys
    ]
    if problems:
        stripped = f' (the prefix "{prefix}" was taken off)' if prefix else ""
        raise WeightsError(
            f"the weights in {checkpoint.path} are not those of this {type(network).__name__}: {'; '.join(problems)}{stripped}"
        )
    with torch.no_grad():
        for key, name in found.items():
            wanted[key].copy_(weights[name])


def _prefixes(weights: Mapping[str, Any]) -> Iterator[str]:
    """Beginnings of names that end in a dot, and the empty one."""
    seen = {""}
    for name in weights:
        parts = name.split(".")[:-1]
        seen.update(".".join(parts[:count]) + "." for count in range(1, min(len(parts), 4) + 1))
    return iter(sorted(seen))


class _StandIn:
    """Takes the place of whatever the restricted reader does not know; keeps what it was given and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.kept: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.kept = state


def _read_torch(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What a torch file holds, with stand-ins, and the names of what they stand for."""
    try:
        with path.open("rb") as file:  # of a path, torch would look at the name and not at what it is
            unknown = sorted(get_unsafe_globals_in_checkpoint(file)) if zipfile.is_zipfile(path) else []
            file.seek(0)
            with safe_globals([(_StandIn, name) for name in unknown]):
                return torch.load(file, map_location="cpu", weights_only=True), tuple(unknown)
    except _UNREADABLE as error:
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = f"it names {called[1]}" if called else lines[0]
        raise ModelFileError(
            f"{path} is damaged, or cannot be read without running what it holds, and is not opened ({reason}); where it can "
            "do no harm, load it and save its state_dict() alone, best with safetensors.torch.save_file"
        ) from error


def _find_weights(path: Path, content: Any) -> dict[str, Tensor]:
    if _is_state_dict(content):
        return dict(content)
    if isinstance(content, _StandIn):
        weights = _of_module(content)
        if weights:
            return weights
    if isinstance(content, Mapping):
        inside = {key: value for key, value in content.items() if _is_state_dict(value)}
        pickled = {key: _of_module(value) for key, value in content.items() if isinstance(value, _StandIn)}
        inside |= {key: weights for key, weights in pickled.items() if weights}
        for key in WRAPPERS:
            if key in inside:
                return dict(inside[key])
        if len(inside) == 1:
            return dict(next(iter(inside.values())))
        if inside:
            raise ModelFileError(
                f"{path} holds several sets of weights ({', '.join(map(str, inside))}); save the one you mean alone, or under "
                f"the key {WRAPPERS[0]}"
            )
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _find_weights(path, content[key])
    keys = f", only {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) and content else ""
    raise ModelFileError(f"{path} holds no state dict (names and tensors){keys}")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _of_module(network: Any) -> dict[str, Tensor]:
    """Names and tensors of a pickled ``nn.Module`` that a stand-in has taken the place of.

    Raises:
        ValueError: more modules than ``MOST_MODULES``: some that share others, or hold themselves, may spell out any number.
    """
    found: dict[str, Tensor] = {}
    front, visited = [("", network)], 0
    while front:
        prefix, module = front.pop()
        state = module.kept if isinstance(module, _StandIn) else None
        if not isinstance(state, Mapping):
            continue
        visited += 1
        if visited > MOST_MODULES:
            raise ValueError(f"more than {MOST_MODULES} modules")
        passing = state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers"):
            for name, tensor in (state.get(part) or {}).items():
                if isinstance(tensor, Tensor) and name not in passing:
                    found[prefix + name] = tensor.detach()
        front.extend((f"{prefix}{name}.", child) for name, child in (state.get("_modules") or {}).items())
    return found
