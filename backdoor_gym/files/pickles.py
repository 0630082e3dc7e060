"""What a torch file would have its reader do, read off it before it is done.

torch's restricted reader (``weights_only=True``) imports and calls nothing of a file's own. But what it does call takes sizes from
the file: a hundred bytes may ask for terabytes, or for a tensor beyond the end of its storage. Here the instructions are followed
on paper, with sizes in place of contents, in time and memory in proportion to the file.
"""

import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
#: What a zip ends with: the end of its directory, where that of a large one is, and that.
ENDING, LARGE_PLACE, LARGE_ENDING = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


class _Named(NamedTuple):
    """A class or a function by its name."""

    name: str


class _Stored(NamedTuple):
    """A storage: its key, how many bytes it is said to have, and bytes of each of its numbers."""

    key: str
    size: int
    item: int


class _Made:
    """A list, a dict, or what a call gave: what copying it takes."""

    def __init__(self) -> None:
        self.size = 0


class _Tensor(_Made):
    """What a call gave that makes tensors."""


class _Tuple(tuple[Any, ...]):
    """A tuple, and what looking it up takes: each part of it as often as it is there, since no tuple remembers its hash."""

    size: int

    def __new__(cls, values: Iterable[Any]) -> "_Tuple":
        self = super().__new__(cls, values)
        self.size = min(1 << 60, 1 + sum(_size(value) if isinstance(value, _Tuple) else 1 for value in self))
        return self


def check_torch_file(path: Path) -> None:
    """Raise ``ModelFileError`` where reading a torch file would take more than the file is worth, or is beyond its end.

    Args:
        path: of a zip that ``torch.save`` wrote, or of a pickle.
    """
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
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ModelFileError(f"{path} is damaged: it holds several records of one name")
        unpacked = sum(entry.file_size for entry in entries.values())
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
        if unpacked > (MOST_UNPACKED if packed else 1) * whole:
            raise ModelFileError(
                f"{path} holds {unpacked:,} bytes in a file of {whole:,}: torch packs nothing; load it where it can do no harm, "
                "and save its state dict anew"
            )
        for name in [name for name in entries if name.endswith("data.pkl")]:
            if entries[name].file_size > MOST_PICKLED:
                raise _too_long(path)
            folder = name.removesuffix("data.pkl")
            sizes = {key.removeprefix(f"{folder}data/"): entry.file_size for key, entry in entries.items()}
            _follow(path, BytesIO(archive.read(name)), sizes)


def _check_ending(path: Path, whole: int) -> None:
    """Two readers must find the same directory in a zip: this one, whose sizes are checked, and torch's."""
    with path.open("rb") as file:
        file.seek(max(0, whole - (1 << 16) - 22))
        tail = file.read()
    place = tail.rfind(ENDING)
    start = place + whole - len(tail)
    large = tail[max(0, place - 20) : place]
    if tail.count(ENDING) != 1 or (large[:4] == LARGE_PLACE and struct.unpack("<Q", large[8:16])[0] != start - 76):
        raise ModelFileError(f"{path} is damaged: a zip has one directory, at its end")


def _check_old(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        stored: dict[str, int] = {}
        for _ in range(OLD_PICKLES):
            if mapped.tell() < len(mapped):
                _follow(path, mapped, None, stored)
        if sum(stored.values()) > len(mapped):
            raise ModelFileError(f"{path} is damaged: its tensors are larger than what is stored of them")


def _follow(path: Path, pickled: Any, sizes: Mapping[str, int] | None, stored: dict[str, int] | None = None) -> None:
    """Follow a pickle up to its end.

    Args:
        path: of the file.
        pickled: what to read it from.
        sizes: of the storages in the file, by key; None where that is not known yet.
        stored: where the sizes go that storages are said to have.
    """
    start = pickled.tell()
    sheet = _Sheet(path, sizes, {} if stored is None else stored)
    for count, (instruction, argument, place) in enumerate(pickletools.genops(pickled)):
        if count > MOST_STEPS or place - start > MOST_PICKLED:
            raise _too_long(path)
        sheet.do(instruction.name, argument)
        if sheet.copied > 2 * (place - start) + SPARE:
            raise ModelFileError(f"{path} is damaged: its pickle copies the same things again and again")


class _Sheet:
    """The reader's stack and memory on paper."""

    def __init__(self, path: Path, sizes: Mapping[str, int] | None, stored: dict[str, int]) -> None:
        self.path, self.sizes, self.stored = path, sizes, stored
        self.copied = self._large = self._asked = 0
        self._names: set[str] = set()
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memory: dict[int, Any] = {}
        self._ways: dict[str, Callable[[Any], None]] = {
            "GLOBAL": self._name,
            "MARK": lambda _: self._mark(),
            "TUPLE": lambda _: self._push(_Tuple(self._since_mark())),
            "APPENDS": lambda _: self._fill(self._since_mark()),
            "SETITEMS": lambda _: self._fill(self._since_mark(), keys=True),
            "APPEND": lambda _: self._fill(self._pop(1)),
            "SETITEM": lambda _: self._fill(self._pop(2), keys=True),
            "BINPUT": self._keep, "LONG_BINPUT": self._keep,
            "BINGET": lambda place: self._push(self._memory[place]),
            "LONG_BINGET": lambda place: self._push(self._memory[place]),
            "BINPERSID": lambda _: self._push(self._storage(*self._pop(1))),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            "NEWOBJ": lambda _: self._call(*self._pop(2)),
            "BUILD": lambda _: self._build(*self._pop(2)),
            "PROTO": lambda _: None,
            "STOP": lambda _: None,
        }  # fmt: skip
        for name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"):
            self._ways[name] = self._push
        for name, value in (("NONE", None), ("NEWTRUE", True), ("NEWFALSE", False), ("EMPTY_TUPLE", _Tuple(()))):
            self._ways[name] = partial(self._push_this, value)
        for name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            self._ways[name] = lambda _: self._push(_Made())
        for name, count in (("TUPLE1", 1), ("TUPLE2", 2), ("TUPLE3", 3)):
            self._ways[name] = partial(self._push_tuple, count)

    def do(self, name: str, argument: Any) -> None:
        """One instruction.

        Raises:
            ModelFileError: one that asks for too much.
            LookupError: one that is not of a file of weights, or finds nothing on the stack.
        """
        self._ways[name](argument)

    def _name(self, said: str) -> None:
        name = _full_name(said)
        self._names.add(name)
        self._ask()
        self._push(_Named(name))

    def _ask(self) -> None:
        self._asked += len(self._names)
        if self._asked > MOST_ASKED:
            raise _too_long(self.path)

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            self._large += 1
            if self._large > MOST_LARGE:
                raise ModelFileError(
                    f"{self.path} is damaged: it holds more than {MOST_LARGE} integers of no usual size"
                )
        self._stack.append(value)

    def _push_this(self, value: Any, _: Any) -> None:
        self._push(value)

    def _push_tuple(self, count: int, _: Any) -> None:
        self._push(_Tuple(self._pop(count)))

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("an instruction finds nothing on the stack")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _keep(self, place: int) -> None:
        self._memory[place] = self._stack[-1]

    def _fill(self, values: list[Any], keys: bool = False) -> None:
        if isinstance(self._stack[-1], _Made):
            self._stack[-1].size += sum(value.size if isinstance(value, _Tuple) else 1 for value in values)
        if keys:
            self.copied += sum(key.size for key in values[::2] if isinstance(key, _Tuple))

    def _storage(self, said: Any) -> _Stored:
        kind, named, key, _, count, *view = said
        item = _item_size(named)
        if _text(kind) != "storage" or type(count) is not int or count < 0:
            raise ValueError("a storage is described in an unknown way")
        if view and view[0] is not None:
            _, start, part = view[0]
            if not 0 <= start <= start + part <= count:
                raise ValueError("a part of a storage lies beyond its end")
            size = part * item
        else:
            size = count * item
        if self.sizes is not None and count * item > self.sizes.get(_text(key), -1):
            raise ModelFileError(f"{self.path} is damaged: a storage is larger than what is stored of it")
        self.stored[_text(key)] = max(count * item, self.stored.get(_text(key), 0))
        return _Stored(_text(key), size, item)

    def _call(self, called: Any, arguments: Any) -> None:
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
        self.copied += sum(_size(argument) for argument in arguments)
        if name in REBUILT:
            self._check_tensor(name, arguments)
        if name == "torch.Size":
            return self._push(arguments[0] if arguments and isinstance(arguments[0], tuple) else None)
        return self._push(_Tensor() if name.startswith("torch.") else _Made())

    def _check_tensor(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A tensor must lie in its storage: where it does not, torch makes the storage larger, or reads what lies behind it."""
        stored, offset, size, strides = arguments[:4]
        item = stored.item
        if name.endswith("_v3"):
            item = _item_size(arguments[6])
        numbers = (offset, *size, *strides)
        if not len(size) == len(strides) <= MOST_DIMENSIONS or not all(
            type(number) is int and number >= 0 for number in numbers
        ):
            raise ValueError("a tensor is described in an unknown way")
        last = offset + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
        if 0 not in size and (last + 1) * item > stored.size:
            raise ModelFileError(f"{self.path} is damaged: a tensor is larger than what is stored of it")
        if name.endswith("qtensor") and math.prod(size) * item > stored.size:  # made anew, as large as it says
            raise ModelFileError(f"{self.path} is damaged: a quantised tensor is larger than what is stored of it")

    def _build(self, thing: Any, state: Any) -> None:
        self._ask()
        if isinstance(thing, _Named) or (isinstance(thing, _Tensor) and isinstance(state, tuple)):
            raise ValueError("a tensor is given another storage")  # which torch would make as large as it has to be
        self.copied += _size(state)
        self._push(thing)


def _too_long(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path} holds far more beside its weights than any network needs; load it where it can do no harm, and save its "
        "state_dict() alone, best with safetensors.torch.save_file"
    )


def _full_name(said: str) -> str:
    """Module and name; those of Python 2 are read as they are called today."""
    module, _, name = said.partition(" ")
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


def _item_size(named: Any) -> int:
    """Bytes of a number, by the name of its dtype, or of a class of storages."""
    if not isinstance(named, _Named):
        raise ValueError("a storage is of an unknown kind")
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
