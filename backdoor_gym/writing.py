"""Everything that the package writes: whole or not at all, in UTF-8, and JSON that any program reads.

Files are written into a folder beside their places and moved there in the end, all together. Nobody ever sees half of one; where
the disk is full, or a process is killed, the files that were there are there still.
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
from tempfile import TemporaryFile, mkdtemp
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from .errors import WriteError

#: How the folders begin that files are written into; what a killed process left of one, the next one that writes there removes.
PREFIX = ".backdoor-gym-"
#: In such a folder: the lock that its process holds, the new files, and the old ones while the new ones are moved.
LOCK, NEW, OLD = "lock", "new", "old"

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A new folder inside another, made if needed: what is written into it is moved out in the end, all files or none.

    Only regular files are replaced. A link to one stays, and what it points to is replaced.

    Raises:
        WriteError: the disk is full, the folder is read-only, or a place is taken by something else than a regular file.
    """
    with telling(folder), made(folder):
        sweep(folder)
        with _temporary(folder) as temporary:
            new, old = temporary / NEW, temporary / OLD
            new.mkdir()
            old.mkdir()
            yield new
            _move(new, folder, old)


@contextmanager
def made(folder: Path, keep: bool = True) -> Iterator[None]:
    """While a folder is there, made if needed; what was made goes again where the block fails, or ``keep`` is False.

    Raises:
        OSError: it cannot be made, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(errno.EEXIST, "it is no folder, and a folder is needed")
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        keep = False
        raise
    finally:
        with suppress(OSError):  # somebody else put something into it
            for one in missing if not keep else ():
                one.rmdir()


def check_room(path: Path, size: int) -> None:
    """Find out before the work that there is no room for a file of so many bytes.

    Raises:
        WriteError: the disk is full, say.
    """
    with telling(path), made(path.parent, keep=False), TemporaryFile(dir=path.parent, buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.write(bytes(size))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to become the file of that path once the block ends; see ``beside``."""
    with telling(path):
        check_place(path)
        real = _real(path)
        with beside(real.parent) as new:
            yield new / real.name


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8; what is no text, such as a file name that is none, is escaped.

    Raises:
        WriteError: see ``beside``.
    """
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def escaped(text: str) -> str:
    """Text with what is no picture of a character, such as the end of a line, escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def check_place(path: Path) -> None:
    """Find out before the work that a path is taken by what is not to be replaced.

    Raises:
        WriteError: a folder, a device, a pipe or a socket is there, or a link to nothing.
    """
    with telling(path):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            try:
                mode = path.stat().st_mode
            except OSError as error:
                raise OSError(errno.EEXIST, "it is a link to nothing; remove it, or name another") from error
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
            raise OSError(errno.EEXIST, f"it is {kind}, and only regular files are replaced")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process has this file locked; its folder is made if needed.

    Raises:
        WriteError: the folder cannot be made or written.
    """
    lock = FileLock(f"{path}.lock")
    with telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove what killed processes left of their writing; what others are writing now stays."""
    for left in folder.glob(f"{PREFIX}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        lock = FileLock(left / LOCK)
        with suppress(OSError):  # a process holds the lock, or the folder is not ours to remove
            lock.acquire(blocking=False)
            try:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                lock.release()


def as_json(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON; numbers that are not finite are null, as JSON has no word for them."""
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
    """While something is written: every error says what it was, and why it could not be.

    Raises:
        WriteError: for any other error of the system.
    """
    try:
        yield
    except SafetensorError as error:  # what the system said stands in its text alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise WriteError(int(number[1]), os.strerror(int(number[1])), str(what)) from error
    except OSError as error:
        raise WriteError(error.errno or errno.EIO, error.strerror or str(error), str(what)) from error
    except UnicodeEncodeError as error:  # of a path: texts are escaped
        raise WriteError(errno.EILSEQ, "the locale has no such characters for names of files", str(what)) from error


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A temporary folder inside another, locked for as long as it is needed."""
    while True:
        made = Path(mkdtemp(prefix=PREFIX, dir=folder))
        lock = FileLock(made / LOCK)
        with suppress(FileNotFoundError):  # somebody swept it away before it was locked
            (made / LOCK).touch()
            lock.acquire()
            if (made / LOCK).exists():
                break
            lock.release()
    try:
        yield made
    finally:
        lock.release()
        shutil.rmtree(made, ignore_errors=True)


def _move(new: Path, folder: Path, old: Path) -> None:
    """Move all files out of ``new``; where one cannot be, those that were moved are taken back."""
    places = [(file, folder / file.name) for file in sorted(new.iterdir())]
    usual = stat.S_IMODE((new.parent / LOCK).stat().st_mode)  # some writers make files that only their owner can read
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
