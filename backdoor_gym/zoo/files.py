"""One safetensors file: tensors, JSON metadata and a checksum; written whole or not at all, never unpickled."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelFileError
from ..writing import replacing

KEY = "backdoor_gym"
#: Format of a file with the weights of a network and nothing else.
STATE_DICT = "state-dict"
#: What ``holds`` says of weights without anything else.
WEIGHTS_ALONE = ("", STATE_DICT)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write the file beside its place and move it there, so that nobody ever sees half of it.

    Raises:
        WriteError: the folder cannot be made or written.
    """
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    described = json.dumps({**metadata, "checksum": _checksum(plain)}, sort_keys=True)
    with replacing(path) as place:
        save_file(plain, place, {KEY: described})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that ``write_tensors`` wrote.

    Raises:
        ModelFileError: missing, truncated or altered, a pickle, or not a file of this package.
    """
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}")
    _refuse_pickle(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is not a readable safetensors file, or is truncated ({error})") from error
    try:
        metadata = json.loads(header[KEY])
        checksum = metadata.pop("checksum")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{path} is a safetensors file, but was not written by backdoor-gym") from error
    if checksum != _checksum(tensors):
        raise ModelFileError(f"{path} is damaged: its contents do not match its checksum")
    return tensors, metadata


def holds(path: Path) -> str | None:
    """The format that a safetensors file of this package says it has, "" for anybody else's; None for any other file."""
    if not path.is_file() or is_pickle(path):
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        return str(json.loads(header[KEY])["format"]) if KEY in header else ""
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None


def is_pickle(path: Path) -> bool:
    """Whether a file begins like a pickle or like what ``torch.save`` writes, whatever its name is.

    safetensors begin with the length of their header, eight bytes that may look like the first ones of a pickle, and then the
    brace that opens it.
    """
    with path.open("rb") as file:
        start = file.read(9)
    looks_pickled = start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
    return looks_pickled and start[8:] != b"{"


def _refuse_pickle(path: Path) -> None:
    """A pickle can run any program when it is read."""
    if is_pickle(path):
        raise ModelFileError(
            f"{path} is a pickle (a torch.save file), whatever its name says; reading it could execute code, so it is "
            "not opened: get it as safetensors"
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
