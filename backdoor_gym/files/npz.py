"""The arrays of an .npz, known by their headers before they are read, and read no further than needed."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, Self

import numpy as np

from ..errors import DataError
from ..wording import cut, first_line

#: How many times as large as in the file an array may be, and what any array may have besides.
MOST_UNPACKED, SPARE = 100, 64 << 20
#: Bytes that are read at once.
AT_ONCE = 1 << 24


class Member(NamedTuple):
    """An array of an .npz, not read; ``fortran`` says whether its first axis runs fastest."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @classmethod
    def of(cls, path: Path, archive: zipfile.ZipFile, name: str) -> Self:
        """That array; raise ``DataError`` where it is no numbers, packed beyond measure, or not as large as its header says."""
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{name} is packed in a way that numpy does not use")
        if entry.file_size > MOST_UNPACKED * entry.compress_size + SPARE:
            raise DataError(
                f"{name} unpacks to {entry.file_size:,} bytes from {entry.compress_size:,}; save fewer images, or with "
                "numpy.savez, which packs nothing"
            )
        with archive.open(entry) as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
        if dtype.hasobject or dtype.kind not in "biufc":
            raise DataError(f"{name} must be numbers, without pickled objects, not of the type {cut(str(dtype))}")
        if any(type(length) is not int or length < 0 for length in shape):
            raise DataError(f"{name} has no shape but {cut(str(shape))}")
        if math.prod(shape) * dtype.itemsize != entry.file_size - start:
            raise DataError(f"{name} is not as large as its header says, {cut(str(shape))} of {dtype}")
        return cls(path, name, shape, dtype, fortran)

    def read(self, chosen: list[int] | None = None) -> np.ndarray:
        """All of it, or the chosen rows of the first axis, which ascend; in C order no other rows are kept (see ``naming``)."""
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
            _header(file)
            if not chosen or self.fortran:
                whole = self._block(file, self.shape)
                return whole if chosen is None else whole[chosen]
            row = self.shape[1:]
            count = max(1, AT_ONCE // max(1, math.prod(row) * self.dtype.itemsize))
            places, picked = np.asarray(chosen), []
            for first in range(0, chosen[-1] + 1, count):
                block = self._block(file, (min(count, self.shape[0] - first), *row))
                picked.append(block[places[(places >= first) & (places < first + count)] - first])
            return np.concatenate(picked)

    def _block(self, file: IO[bytes], shape: tuple[int, ...]) -> np.ndarray:
        numbers = np.empty(math.prod(shape), self.dtype)
        room = numbers.view(np.uint8).data
        for place in range(0, len(room), AT_ONCE):
            part = room[place : place + AT_ONCE]
            part[:] = file.read(len(part))  # a ValueError where the file is truncated
        return numbers.reshape(shape, order="F" if self.fortran else "C")


def members(path: Path, names: tuple[str, ...]) -> list[Member]:
    """The arrays of those names in an .npz.

    Raises:
        DataError: no such file, one that is damaged or no .npz, or other arrays.
    """
    if not path.is_file():
        raise DataError(f"{path} cannot be read: there is no such file")
    with naming(path), zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if not set(names) <= set(held):
            listed = ", ".join(map(cut, held[:6])) or "none"
            raise DataError(f"it must hold the arrays {' and '.join(names)}, and holds {listed}")
        return [Member.of(path, archive, name) for name in names]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that reads an .npz: every error in it becomes a ``DataError`` that names the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # whatever a damaged archive makes its readers raise
        raise DataError(f"{path} cannot be read as an .npz without pickled objects: {first_line(error)}") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype; what stands there is read as literals, never run."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise DataError(f"an array of numpy's format {version[0]}.{version[1]}, which no plain numbers need")
