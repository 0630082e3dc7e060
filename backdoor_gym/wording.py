"""Values of anybody's making in messages: characters that can be shown, of a bearable length."""

import re
from reprlib import Repr
from typing import Any

#: Characters of a value in a message, and of a whole message.
MOST_SHOWN, MOST_SAID = 80, 4000
#: Characters of the first line of an error of a library, which may repeat what a file says.
MOST_OF_ERROR = 400
#: Characters of the name of a file.
MOST_OF_NAME = 100
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, MOST_SHOWN, MOST_SHOWN, 40


def printable(said: str) -> str:
    """Text whose control characters are replaced; line ends stay."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in said)


def shown(value: Any) -> str:
    """A value as Python writes it, cut; the time does not depend on its length."""
    try:
        said = _SHORT.repr(value)
    except Exception:  # whatever the value's own code raises; a number of thousands of digits has no text at all
        said = f"something of the type {type(value).__name__}"
    return one_line(said)


def cut(said: str, most: int = MOST_SHOWN) -> str:
    """Text without its middle where it is longer than ``most``."""
    return said if len(said) <= most else f"{said[: most // 2]}...{said[len(said) - most // 2 :]}"


def one_line(said: str, most: int = MOST_SAID) -> str:
    """Text in one printable line, cut to ``most``."""
    return " ".join(printable(cut(said, most)).split("\n"))


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, cut; its type where it says nothing."""
    return cut((str(error).strip() or type(error).__name__).splitlines()[0], MOST_OF_ERROR)


def path_component(name: str) -> str:
    """A name as that of one file or folder, without separators and leading dots."""
    safe = re.sub(r"[^\w.+=@ -]", "-", printable(name[:MOST_OF_NAME]))
    short = safe.encode()[: 2 * MOST_OF_NAME].decode(errors="ignore")  # file systems count bytes
    return short.lstrip(". -").rstrip(". ") or "unnamed"
