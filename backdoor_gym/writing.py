"""Everything that the package writes: whole or not at all, in UTF-8, and JSON that any program reads.

Files are written into a folder beside their places and moved there together in the end. Where the disk is full, or a process is
killed, the old files are still there.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from .errors import WriteError

#: Beginning of the names of temporary folders; the next writer removes what a killed process left of one.
PREFIX = ".backdoor-gym-"
#: In such a folder: the lock that its process holds, the new files, and the old ones while the new ones are moved.
LOCK, NEW, OLD = "lock", "new", "old"

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A temporary folder inside another (made if needed), whose files are moved out in the end: all or none.

    Only regular files are replaced. A link to one stays, and what it points to is replaced.

    Raises:
        WriteError: the disk is full, the folder is read-only, or a place is taken by something else than a regular file.
    """
    with telling(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        temporary, lock = _temporary(folder)
        try:
            new, old = temporary / NEW, temporary / OLD
            new.mkdir()
            old.mkdir()
            yield new
            _move(new, folder, old)
        finally:
            lock.release()
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The place to write what becomes the file of that path when the block ends; see ``beside``."""
    with telling(path):
        check_place(path)
        real = _real(path)
        with beside(real.parent) as new:
            yield new / real.name


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, with surrogates escaped, such as those of broken file names; see ``beside``."""
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def escaped(text: str) -> str:
    """Text whose control characters, line ends too, are escaped as Python writes them."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def check_place(path: Path) -> None:
    """Find out before the work that a file cannot be replaced.

    Raises:
        WriteError: the path is a folder, a device, a pipe, a socket, or a link to one of these or to nothing.
    """
    with telling(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                raise OSError(errno.EEXIST, "it is a link to nothing; remove it, or name another") from None
            return
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise OSError(errno.EEXIST, f"it is {kind}, and only regular files are replaced")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block in which no other process has this file locked; its folder is made if needed.

    Raises:
        WriteError: the folder cannot be made or written.
    """
    with telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{path}.lock").acquire()
    with held:
        yield


def sweep(folder: Path) -> None:
    """Remove the temporary folders of killed processes; those of living ones stay."""
    for left in folder.glob(f"{PREFIX}*"):
        if left.is_dir() and not left.is_symlink():
            with suppress(OSError), FileLock(left / LOCK, timeout=0):  # locked by its process, or not ours to remove
                shutil.rmtree(left, ignore_errors=True)


def as_json(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON, with null for numbers that are not finite: JSON has no word for them."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Plain data with None for each number that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([finite(entry) for entry in value])
    return value


@contextmanager
def telling(what: Path | str) -> Iterator[None]:
    """A block whose errors of the system become a ``WriteError`` that names what was to be written."""
    try:
        yield
    except SafetensorError as error:  # the system's error number stands only in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise WriteError(int(number[1]), os.strerror(int(number[1])), str(what)) from error
    except OSError as error:
        raise WriteError(error.errno or errno.EIO, error.strerror or str(error), str(what)) from error
    except UnicodeEncodeError as error:  # of a path: texts are escaped
        raise WriteError(errno.EILSEQ, "the locale has no such characters for names of files", str(what)) from error


def _temporary(folder: Path) -> tuple[Path, FileLock]:
    """A new temporary folder inside another, and its lock, which is held."""
    while True:
        made = Path(mkdtemp(prefix=PREFIX, dir=folder))
        lock = FileLock(made / LOCK)
        with suppress(FileNotFoundError):  # another process swept the folder away before it was locked
            lock.acquire()
            if (made / LOCK).exists():
                return made, lock
            lock.release()


def _move(new: Path, folder: Path, old: Path) -> None:
    """Move all files out of ``new``; where one cannot be moved, the others are taken back."""
    places = [(file, folder / file.name) for file in sorted(new.iterdir())]
    usual = stat.S_IMODE(new.stat().st_mode) & 0o666  # some writers make files that only their owner can read
    for file, place in places:
        check_place(place)
        file.chmod(usual)
        with file.open("rb+") as content:
            os.fsync(content.fileno())  # a full disk may show only now
    undo: list[tuple[Path, Path, bool]] = []
    try:
        for file, place in places:
            real, kept = _real(place), old / file.name
            if existed := real.exists():
                with suppress(OSError):  # without links there is no way back
                    os.link(real, kept)
            os.replace(file, real)
            undo.append((real, kept, existed))
    except OSError:
        for real, kept, existed in undo:
            if kept.exists():
                os.replace(kept, real)
            elif not existed:
                real.unlink()
        raise


def _real(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path
