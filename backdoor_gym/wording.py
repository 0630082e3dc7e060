"""How values of anybody's making are named in messages: in characters that can be shown, and cut to a bearable length."""

import re
from reprlib import Repr
from typing import Any

#: Characters of a value in a message, and of a whole message.
MOST_SHOWN, MOST_SAID = 80, 4000
#: Characters of the name of a file.
MOST_OF_NAME = 100
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, MOST_SHOWN, MOST_SHOWN, 40


def printable(said: str) -> str:
    """Text as it was, without what would be no picture of a character, in files that may say anything."""
    return "".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in said)


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long; in time that does not depend on how long."""
    try:
        said = _SHORT.repr(value)
    except Exception:  # whatever the value's own code raises; a number of thousands of digits has no text at all
        said = f"something of the type {type(value).__name__}"
    return one_line(said)


def cut(said: str, most: int = MOST_SHOWN) -> str:
    """Text of a bearable length: the middle of a longer one is left out."""
    return said if len(said) <= most else f"{said[: most // 2]}...{said[len(said) - most // 2 :]}"


def one_line(said: str, most: int = MOST_SAID) -> str:
    """Text in one line of a bearable length, in characters that can be shown."""
    return " ".join(printable(cut(said, most)).split("\n"))


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def path_component(name: str) -> str:
    """A name as that of one file or folder, never of another one: letters, digits and a few signs, no dot in front."""
    safe = re.sub(r"[^\w.+=@ -]", "-", printable(name[:MOST_OF_NAME]))
    short = safe.encode()[: 2 * MOST_OF_NAME].decode(errors="ignore")  # file systems count bytes
    return short.lstrip(". -").rstrip(". ") or "unnamed"
