"""Other people's checkpoints: weights out of safetensors and torch files, without running anything that came with them.

torch files are read by torch's restricted reader (``weights_only=True``). What it does not know (numpy numbers, an
``argparse.Namespace``, a pickled class, ...) is neither imported nor called: an inert stand-in takes its place, and it is named.
"""

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import ModelFileError
from ..wording import cut, first_line, printable
from .pickles import check_torch_file, is_zip
from .plain import odd_kind
from .tensors import MOST_NAME, check_names, is_pickle, read_safetensors

#: Keys under which training code keeps the weights, the likelier first (``netC`` is the classifier beside a generator).
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "netC", "network", "weights", "params")
#: What a checkpoint may say about itself beside the weights, as BackdoorBench's do, and the type of each.
FACTS = {"model_name": str, "num_classes": int, "clean_data": str, "img_size": list | tuple}
#: First bytes of archives. A zip may be a torch file, which holds a pickle of this name.
ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x28\xb5\x2f\xfd")
TORCH_PICKLE = "data.pkl"
#: Modules of a pickled network that are looked into, parts of all of them, and networks in a file.
MOST_MODULES, MOST_PARTS, MOST_NETWORKS = 20_000, 100_000, 64
#: Dicts in dicts that weights are looked for in.
MOST_DEPTH = 10


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
    """Read the weights of a safetensors or a torch file (``.pt``, ``.pth``, ``.tar``, ...), told apart by its first bytes.

    A torch file holds a state dict, a dict that holds one (under a key of ``WRAPPERS``, or the only one there), or a whole
    pickled network, of which only the tensors are taken.

    Raises:
        ModelFileError: missing, damaged, of another kind, without weights or with several sets of them, or one that would call
            into the operating system when read.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise ModelFileError(f"there is no file {path}")
    refuse_archive(path)
    if not is_pickle(path):
        weights, _ = read_safetensors(path)
        if not weights:
            raise ModelFileError(f"{path} holds no tensor")
        return Checkpoint(path, weights, {})
    content, unread = _read_torch(path)
    try:
        weights = _find_weights(path, content)
    except ModelFileError:
        raise
    except (RecursionError, TypeError, AttributeError, ValueError) as error:  # it holds itself, or parts of other kinds
        raise ModelFileError(f"{path} is damaged: what it holds is not put together as weights are") from error
    check_names(path, weights)
    for name, tensor in weights.items():
        odd = odd_kind(tensor)
        if odd == "quantised":
            raise _quantised(path, name)
        if odd:
            raise ModelFileError(
                f"{path} holds a tensor that is no plain array of numbers ({name} is {odd}): save the dense one in its place"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelFileError(f"{path} is damaged: {name} is larger than what is stored of it")
    return Checkpoint(path, weights, _facts(content), unread)


def is_archive(path: Path) -> bool:
    """Whether a file begins like an archive (zip, tar, gz, 7z, ...) and is no torch file."""
    with path.open("rb") as file:
        start = file.read(262)
    if start.startswith(ARCHIVES) or start[257:] == b"ustar":
        return True
    if not start.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return not any(name.count("/") <= 1 and name.rpartition("/")[2] == TORCH_PICKLE for name in names)


def refuse_archive(path: Path) -> None:
    """Raise ``ModelFileError`` for an archive: weights are not looked for in it."""
    if is_archive(path):
        raise ModelFileError(
            f"{path} is an archive around other files: unpack it first, and name the file with the weights (BackdoorBench's is "
            "attack_result.pt)"
        )


class _StandIn:
    """Takes the place of a class or function that torch's reader does not know: keeps what it is given, and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.kept: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.kept = state


def _read_torch(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The content of a torch file, with stand-ins, and the names of what they stand for."""
    check_torch_file(path)
    try:
        with path.open("rb") as file:  # of a path, torch would look at the name and not at what it is
            unknown = sorted(get_unsafe_globals_in_checkpoint(file)) if is_zip(path) else []
            file.seek(0)
            with safe_globals([(_StandIn, name) for name in unknown]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        return content, tuple(printable(cut(name, MOST_NAME)) for name in unknown)
    except Exception as error:  # whatever a damaged file makes its readers raise
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {called[1]}" if called else first_line(error)
        raise ModelFileError(
            f"{path} is damaged, or cannot be read without running what it holds, and is not opened ({reason}); where it can "
            "do no harm, load it and save its state_dict() alone, best with safetensors.torch.save_file"
        ) from error


def _facts(content: Any) -> dict[str, Any]:
    """The ``FACTS`` of the right types and of bearable length."""
    said = {key: content.get(key) for key in FACTS} if isinstance(content, Mapping) else {}
    typed = {key: value for key, value in said.items() if isinstance(value, FACTS[key])}
    return {key: value for key, value in typed.items() if isinstance(value, int) or len(value) <= MOST_NAME}


def _find_weights(path: Path, content: Any, depth: int = 0) -> dict[str, Tensor]:
    """The state dict in the content of a torch file."""
    if depth > MOST_DEPTH:
        raise ValueError(f"more than {MOST_DEPTH} dicts in dicts")
    if _is_state_dict(content):
        return dict(content)
    if isinstance(content, _StandIn) and (weights := _of_module(content)):
        return weights
    if isinstance(content, Mapping):
        own, inside = _own_tensors(path, content), _state_dicts(content)
        most = max(map(len, inside.values()), default=0)
        if len(own) > most:
            return own
        for key in WRAPPERS:
            if key in inside:
                return dict(inside[key])
            if _own_tensors(path, content.get(key)):
                return _find_weights(path, content[key], depth + 1)
        if own and len(own) == most:
            return own
        if len(inside) == 1:
            return dict(*inside.values())
        if inside:
            raise ModelFileError(
                f"{path} holds several sets of weights ({', '.join(map(str, inside))}); save the one you mean alone, or under "
                f"the key {WRAPPERS[0]}"
            )
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _find_weights(path, content[key], depth + 1)
    keys = f", only {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) and content else ""
    raise ModelFileError(f"{path} holds no state dict (names and tensors){keys}")


def _state_dicts(content: Mapping[Any, Any]) -> dict[Any, Mapping[str, Tensor]]:
    """The state dicts in a dict, and those of the pickled networks in it, by key."""
    distinct = {id(value): value for value in content.values()}  # one dict may be there under many keys
    suitable = {place for place, value in distinct.items() if _is_state_dict(value)}
    networks = {key: value for key, value in content.items() if isinstance(value, _StandIn)}
    if len(networks) > MOST_NETWORKS:
        networks = {key: value for key, value in networks.items() if key in WRAPPERS}
    pickled = {key: _of_module(value) for key, value in networks.items()}
    inside = {key: value for key, value in content.items() if id(value) in suitable}
    return inside | {key: weights for key, weights in pickled.items() if weights}


def _own_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The weights right in a dict, between numbers, texts and other dicts; none where there are but counters.

    Raises:
        ModelFileError: they are of a quantised network.
    """
    if not isinstance(content, Mapping):
        return {}
    for key in content:
        if isinstance(key, str) and "_packed_params" in key:
            raise _quantised(path, key)
    own = {key: value for key, value in content.items() if _is_weight(key, value)}
    return own if any(tensor.ndim for tensor in own.values()) else {}


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(starmap(_is_weight, value.items()))


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _of_module(network: _StandIn) -> dict[str, Tensor]:
    """Names and tensors of a pickled ``nn.Module``; a ``ValueError`` for modules that share or hold each other without end."""
    weights: dict[str, Tensor] = {}
    front, visited, parts = [("", network)], 0, 0
    while front:
        prefix, module = front.pop()
        state = module.kept if isinstance(module, _StandIn) else None
        if not isinstance(state, Mapping):
            continue
        visited += 1
        parts += sum(len(state.get(part) or ()) for part in ("_parameters", "_buffers", "_modules"))
        if visited > MOST_MODULES or parts > MOST_PARTS or len(prefix) > MOST_NAME:
            raise ValueError("more modules, parts, or characters of a name than any network has")
        passing = state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers"):
            for name, tensor in (state.get(part) or {}).items():
                if isinstance(tensor, Tensor) and name not in passing:
                    weights[prefix + name] = tensor.detach()
        front.extend((f"{prefix}{name}.", child) for name, child in (state.get("_modules") or {}).items())
    return weights


def _quantised(path: Path, name: str) -> ModelFileError:
    return ModelFileError(
        f"{path} holds the weights of a quantised network ({name}), which cannot be pruned; give the state dict of the network of "
        "floats that it was made of"
    )
