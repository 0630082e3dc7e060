"""What a torch file would have its reader do, told from the file before it is read.

torch's restricted reader (``weights_only=True``) imports and calls nothing of a file's own. But what it calls takes sizes from the
file: a hundred bytes may ask for terabytes, or for a tensor beyond the end of its storage. Here the instructions are followed with
sizes in place of contents, in time and memory in proportion to the file.
"""

import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ModelFileError
from ..wording import cut

#: Instructions, and bytes, of the pickle of one file: that of a large network has some ten thousand.
MOST_STEPS, MOST_PICKLED = 2_000_000, 256 << 20
#: Integers of more than 64 bits, which generators of random numbers have: as keys, many would be looked up in quadratic time.
MOST_LARGE = 1000
#: Names of classes and functions times instructions that name or call one: torch goes through all names each time.
MOST_ASKED = 20_000_000
MOST_DIMENSIONS = 64
#: How much larger what is packed in a zip may be than the file. torch packs nothing.
MOST_UNPACKED = 4
#: What calls may copy, all together, beyond twice the size of the pickle.
SPARE = 1 << 20
#: What is called in a file of weights: it makes small things, or copies what it is given.
CALLED = frozenset(
    {
        "_codecs.encode", "builtins.complex", "builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size",
        "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch.device",
        "torch.serialization._get_layout",
    }
)  # fmt: skip
#: Those that make a tensor of a storage, an offset, a size and strides.
REBUILT = frozenset(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
#: What the reader knows itself, beside ``CALLED``; all else is a stand-in of this package, which may be called with anything.
KNOWN = re.compile(
    r"builtins\.bytearray|torch\.\w+|torch\.(\w+\.)*\w*(Tensor|Storage)|torch\._(utils|tensor)\.\w+|"
    r"torch\.(storage|nested|distributed)\..*"
)
#: Classes of storages, and bytes of a number in each.
STORAGES = {
    "BFloat16Storage": 2, "BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "IntStorage": 4, "LongStorage": 8,
    "QInt32Storage": 4, "QInt8Storage": 1, "QUInt2x4Storage": 1, "QUInt4x2Storage": 1, "QUInt8Storage": 1, "ShortStorage": 2,
    "UntypedStorage": 1,
}  # fmt: skip
#: Pickles in a row in a file of torch before 1.6, after which come the storages.
OLD_PICKLES = 5
#: The end of a zip's directory, and in front of it the place of the end of a large zip's directory.
ENDING, LARGE_PLACE = b"PK\x05\x06", b"PK\x06\x07"


class _Named(NamedTuple):
    """A class or a function by its name."""

    name: str


class _Stored(NamedTuple):
    """A storage: its bytes as the file says, and those of one number."""

    size: int
    item: int


class _Made:
    """A list, a dict, or the result of a call; ``size`` is what copying it takes."""

    def __init__(self) -> None:
        self.size = 0


class _Tensor(_Made):
    """The result of a call that makes tensors."""


class _Tuple(tuple[Any, ...]):
    """A tuple; ``size`` is what looking it up takes: each part as often as it is there, as no tuple remembers its hash."""

    size: int

    def __new__(cls, values: Iterable[Any]) -> "_Tuple":
        self = super().__new__(cls, values)
        self.size = min(1 << 60, 1 + sum(value.size if isinstance(value, _Tuple) else 1 for value in self))
        return self


def check_torch_file(path: Path) -> None:
    """Raise ``ModelFileError`` for a torch file whose reading would take far more than it is worth, or go beyond its end."""
    try:
        if is_zip(path):
            _check_zip(path)
        else:
            _check_old(path)
    except ModelFileError:
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise
        reason = str(error).strip() or type(error).__name__
        raise ModelFileError(f"{path} is damaged, and is not opened ({cut(reason)})") from error


def is_zip(path: Path) -> bool:
    """Whether torch takes a file for a zip."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_zip(path: Path) -> None:
    whole = path.stat().st_size
    _check_ending(path, whole)
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if len(sizes) != len(archive.infolist()):
            raise _damaged(path, "it holds several records of one name")
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if sum(sizes.values()) > (MOST_UNPACKED if packed else 1) * whole:
            raise ModelFileError(
                f"{path} holds {sum(sizes.values()):,} bytes in a file of {whole:,}: torch packs nothing; load it where it can "
                "do no harm, and save its state dict anew"
            )
        for name in [name for name in sizes if name.endswith("data.pkl")]:
            if sizes[name] > MOST_PICKLED:
                raise _too_long(path)
            folder = f"{name.removesuffix('data.pkl')}data/"
            stored = {key.removeprefix(folder): size for key, size in sizes.items()}
            _Reader(path, stored).follow(BytesIO(archive.read(name)))


def _check_ending(path: Path, whole: int) -> None:
    """Two readers must find the same directory in a zip: zipfile, whose sizes are checked, and torch's."""
    with path.open("rb") as file:
        file.seek(max(0, whole - (1 << 16) - 22))
        tail = file.read()
    place = tail.rfind(ENDING)
    start = place + whole - len(tail)
    large = tail[max(0, place - 20) : place]
    if tail.count(ENDING) != 1 or (large[:4] == LARGE_PLACE and struct.unpack("<Q", large[8:16])[0] != start - 76):
        raise _damaged(path, "a zip has one directory, at its end")


def _check_old(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        needed: dict[str, int] = {}
        for _ in range(OLD_PICKLES):
            if mapped.tell() < len(mapped):
                reader = _Reader(path, None)
                reader.follow(mapped)
                for key, size in reader.needed.items():
                    needed[key] = max(size, needed.get(key, 0))
        if sum(needed.values()) > len(mapped):
            raise _damaged(path, "its tensors are larger than what is stored of them")


class _Reader:
    """torch's reader with sizes in place of contents; ``sizes`` has the bytes of each storage in the file, where known."""

    def __init__(self, path: Path, sizes: Mapping[str, int] | None) -> None:
        self.path, self.sizes = path, sizes
        #: Bytes that each storage must have, by key.
        self.needed: dict[str, int] = {}
        self._copied = self._large = self._asked = 0
        self._names: set[str] = set()
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memory: dict[int, Any] = {}

    def follow(self, pickled: Any) -> None:
        """Follow a pickle to its end; raise ``ModelFileError`` for what is too much, and anything for what is damaged."""
        start = pickled.tell()
        for count, (instruction, argument, place) in enumerate(pickletools.genops(pickled)):
            if count > MOST_STEPS or place - start > MOST_PICKLED:
                raise _too_long(self.path)
            self._do(instruction.name, argument)
            if self._copied > 2 * (place - start) + SPARE:
                raise _damaged(self.path, "its pickle copies the same things again and again")

    def _do(self, name: str, argument: Any) -> None:
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self._memory[argument] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._push(self._memory[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                self._push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self._push(_Made())
            case "EMPTY_TUPLE":
                self._push(_Tuple(()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(_Tuple(self._pop(int(name[-1]))))
            case "MARK":
                self._outer.append(self._stack)
                self._stack = []
            case "TUPLE":
                self._push(_Tuple(self._since_mark()))
            case "APPEND" | "APPENDS":
                self._fill(self._pop(1) if name == "APPEND" else self._since_mark())
            case "SETITEM" | "SETITEMS":
                self._fill(self._pop(2) if name == "SETITEM" else self._since_mark(), keys=True)
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                called = f"{'builtins' if module == '__builtin__' else module}.{attribute}"  # as of Python 2
                self._names.add(called)
                self._ask()
                self._push(_Named(called))
            case "BINPERSID":
                self._push(self._storage(*self._pop(1)))
            case "REDUCE" | "NEWOBJ":
                self._push(self._call(*self._pop(2)))
            case "BUILD":
                self._build(*self._pop(2))
            case "PROTO" | "STOP":
                pass
            case _:
                raise LookupError(f"the instruction {name}, which no weights need")

    def _ask(self) -> None:
        self._asked += len(self._names)
        if self._asked > MOST_ASKED:
            raise _too_long(self.path)

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            self._large += 1
            if self._large > MOST_LARGE:
                raise _damaged(self.path, f"it holds more than {MOST_LARGE} integers of no usual size")
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("an instruction finds nothing on the stack")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _fill(self, values: list[Any], keys: bool = False) -> None:
        """Put values, or keys and values in turn, into what is on the stack."""
        if isinstance(self._stack[-1], _Made):
            self._stack[-1].size += sum(value.size if isinstance(value, _Tuple) else 1 for value in values)
        if keys:
            self._copied += sum(key.size for key in values[::2] if isinstance(key, _Tuple))

    def _storage(self, description: Any) -> _Stored:
        kind, named, key, _, count, *view = description
        item, key = _item_size(named), _text(key)
        if _text(kind) != "storage" or type(count) is not int or count < 0:
            raise ValueError("a storage is described in an unknown way")
        part = count
        if view and view[0] is not None:
            _, start, part = view[0]
            if not 0 <= start <= start + part <= count:
                raise ValueError("a part of a storage lies beyond its end")
        if self.sizes is not None and count * item > self.sizes.get(key, -1):
            raise _damaged(self.path, "a storage is larger than what is stored of it")
        self.needed[key] = max(count * item, self.needed.get(key, 0))
        return _Stored(part * item, item)

    def _call(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, _Named) or not isinstance(arguments, tuple):
            raise ValueError("something is called that is no function")
        name = called.name
        self._ask()
        if name == "torch._tensor._rebuild_from_type_v2":  # which calls another one
            return self._call(*arguments[:3:2])
        if KNOWN.fullmatch(name) and name not in CALLED:
            raise ModelFileError(
                f"{self.path} cannot be read without calling {cut(name)}, which no weights need, and is not opened; where it "
                "can do no harm, load it and save its state_dict() alone, best with safetensors.torch.save_file"
            )
        self._copied += sum(_size(argument) for argument in arguments)
        if name in REBUILT:
            self._check_tensor(name, arguments)
        if name == "torch.Size":
            return arguments[0] if arguments and isinstance(arguments[0], tuple) else None
        return _Tensor() if name.startswith("torch.") else _Made()

    def _check_tensor(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A tensor must lie in its storage: otherwise torch makes the storage larger, or reads what lies behind it."""
        stored, offset, size, strides = arguments[:4]
        item = _item_size(arguments[6]) if name.endswith("_v3") else stored.item
        known = all(type(number) is int and number >= 0 for number in (offset, *size, *strides))
        if not known or not len(size) == len(strides) <= MOST_DIMENSIONS:
            raise ValueError("a tensor is described in an unknown way")
        last = offset + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
        if 0 not in size and (last + 1) * item > stored.size:
            raise _damaged(self.path, "a tensor is larger than what is stored of it")
        if name.endswith("qtensor") and math.prod(size) * item > stored.size:  # made anew, as large as it says
            raise _damaged(self.path, "a quantised tensor is larger than what is stored of it")

    def _build(self, thing: Any, state: Any) -> None:
        self._ask()
        if isinstance(thing, _Named) or (isinstance(thing, _Tensor) and isinstance(state, tuple)):
            raise ValueError("a tensor is given another storage")  # which torch would make as large as it has to be
        self._copied += _size(state)
        self._push(thing)


def _damaged(path: Path, why: str) -> ModelFileError:
    return ModelFileError(f"{path} is damaged: {why}")


def _too_long(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path} holds far more beside its weights than any network needs; load it where it can do no harm, and save its "
        "state_dict() alone, best with safetensors.torch.save_file"
    )


def _item_size(named: Any) -> int:
    """Bytes of a number, by the name of its dtype, or of a class of storages."""
    module, _, name = named.name.rpartition(".")
    dtype = getattr(torch, name, None)
    if module == "torch" and isinstance(dtype, torch.dtype):
        return dtype.itemsize
    if module not in ("torch", "torch.storage", "torch.cuda") or name not in STORAGES:
        raise ValueError("a storage is of an unknown kind")
    return STORAGES[name]


def _size(value: Any) -> int:
    """What copying it takes, in bytes or things."""
    if isinstance(value, _Made | _Tuple):
        return value.size
    return len(value) if isinstance(value, str | bytes) else 1


def _text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
