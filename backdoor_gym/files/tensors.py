"""One safetensors file: tensors, JSON metadata and a checksum of both; written whole or not at all, never unpickled."""

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelFileError
from ..wording import first_line
from ..writing import replacing
from .schemas import MOST_METADATA, plain

KEY = "backdoor_gym"
#: What the checksum covers: in version 2 names, dtypes, shapes, contents and metadata; in version 1 names and contents.
PROTECTION = 2
#: Tensors of a file, characters of the name of each, and bytes of the header of a safetensors file.
MOST_TENSORS, MOST_NAME, MOST_HEADER = 50_000, 500, 16 << 20
#: Format of a file with the weights of a network and nothing else.
STATE_DICT = "state-dict"
#: Raises where a file is not to be read, by the names and shapes of its tensors.
Look = Callable[[Mapping[str, Sequence[int]]], object]
#: What ``holds`` returns for weights without anything else.
WEIGHTS_ALONE = ("", STATE_DICT)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all.

    Raises:
        WriteError: the folder cannot be made or written.
    """
    held = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    described = json.loads(json.dumps({**metadata, "protection": PROTECTION}))  # tuples are lists there
    text = json.dumps({**described, "checksum": _checksum(held, described)}, sort_keys=True)
    with replacing(path) as place:
        save_file(held, place, {KEY: text})


def read_tensors(path: Path, look: Look = len) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that ``write_tensors`` wrote; ``look`` sees their shapes before they are read.

    The checksum tells damage. It is no signature: whoever writes a file can compute it.

    Raises:
        ModelFileError: missing, truncated or altered, a pickle, or not a file of this package.

    Warns:
        UserWarning: the file is of version 1, whose metadata nothing protects.
    """
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}")
    if is_pickle(path):
        raise ModelFileError(
            f"{path} is a pickle (a torch.save file), whatever its name says; reading it could execute code, so it is "
            "not opened: get it as safetensors"
        )
    tensors, header = read_safetensors(path, look)
    if KEY not in header:
        raise ModelFileError(f"{path} is a safetensors file, but was not written by backdoor-gym")
    metadata = _decoded(path, header[KEY])
    checksum = metadata.pop("checksum", None)
    protection = metadata.get("protection", 1)
    if protection not in (1, PROTECTION) or type(protection) is not int:
        raise ModelFileError(f"{path} is protected in a way that this version of backdoor-gym does not know")
    if checksum != _checksum(tensors, None if protection == 1 else metadata):
        raise ModelFileError(f"{path} is damaged: its contents do not match its checksum")
    if metadata.pop("protection", 1) == 1:
        warnings.warn(
            f"{path} was written by an early version, which did not protect its metadata (name, target, data set, ...): damage "
            "in them cannot be told; save it anew",
            stacklevel=2,
        )
    return tensors, metadata


def read_safetensors(path: Path, look: Look = len) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of anybody's safetensors file, and the metadata in its header.

    Raises:
        ModelFileError: damaged, of another kind, or with a header or names beyond those of any network.
    """
    try:
        with path.open("rb") as file:
            length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
        if not path.stat().st_size:
            raise ModelFileError(f"{path} is empty")
        if brace != b"{" and path.suffix != ".safetensors":
            raise ModelFileError(
                f"{path} is no file of weights: it begins neither as safetensors nor as what torch.save writes"
            )
        if MOST_HEADER < length <= path.stat().st_size:  # a longer one is none
            raise ModelFileError(f"{path} has a header of {length:,} bytes; {MOST_HEADER:,} is the most")
        with safe_open(str(path), framework="pt") as opened:
            names = list(opened.keys())
            check_names(path, names)
            look({name: opened.get_slice(name).get_shape() for name in names})
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except ModelFileError:
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise ModelFileError(
            f"{path} is not a readable safetensors file, or is truncated ({first_line(error)})"
        ) from error


def check_names(path: Path, names: Collection[str]) -> None:
    """Raise ``ModelFileError`` for more tensors, or longer names, than networks have."""
    if len(names) > MOST_TENSORS:
        raise ModelFileError(f"{path} holds {len(names):,} tensors; {MOST_TENSORS:,} is the most")
    longest = max(names, key=len, default="")
    if len(longest) > MOST_NAME:
        raise ModelFileError(
            f"{path} holds a tensor with a name of {len(longest):,} characters; {MOST_NAME} is the most"
        )


def holds(path: Path) -> str | None:
    """The format that a safetensors file of this package says it has, "" for anybody else's; None for any other file."""
    if not path.is_file() or is_pickle(path):
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        return str(_decoded(path, header[KEY])["format"]) if KEY in header else ""
    except (ModelFileError, SafetensorError, OSError, KeyError):
        return None


def is_pickle(path: Path) -> bool:
    """Whether a file begins like a pickle or like what ``torch.save`` writes, whatever its name is.

    A safetensors file begins with the length of its header, eight bytes that may look like a pickle's, and the brace that opens it.
    """
    with path.open("rb") as file:
        start = file.read(9)
    looks_pickled = start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
    return looks_pickled and start[8:] != b"{"


def _decoded(path: Path, text: str) -> dict[str, Any]:
    """The metadata, which are JSON: no NaN, no lone surrogate."""
    if len(text) > MOST_METADATA:
        raise ModelFileError(f"{path} has {len(text):,} characters of metadata; at most {MOST_METADATA:,} are read")
    try:
        metadata = msgspec.json.decode(text)
        plain(metadata)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ModelFileError(f"{path} has metadata that are not JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise ModelFileError(f"{path} has metadata that are no object of JSON, so backdoor-gym did not write it")
    return metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None) -> str:
    """SHA-256 of all that a file holds; of names and contents of the tensors alone without metadata."""
    digest = hashlib.sha256()
    if metadata is not None:
        kinds = [[key, str(tensors[key].dtype), list(tensors[key].shape)] for key in sorted(tensors)]
        digest.update(json.dumps([metadata, kinds], sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
