"""Text that may come from anybody's file, made fit to be shown, to stand in one line, and to name a file."""

import re

#: Characters of a message, and of the name of a file.
MOST, MOST_OF_NAME = 2000, 100


def printable(text: str) -> str:
    """The text with U+FFFD for what is no picture of a character: control characters, lone surrogates; newlines stay."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def one_line(text: str, most: int = MOST) -> str:
    """The text without control characters and newlines, cut to so many characters."""
    line = printable(text[: most + 1].replace("\n", " ").replace("\t", " "))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def path_component(name: str) -> str:
    """A name as that of one file or folder, never of another one: letters, digits and a few signs, no dot in front."""
    safe = re.sub(r"[^\w.+=@ -]", "-", printable(name[: MOST_OF_NAME + 1]))[:MOST_OF_NAME]
    return safe.lstrip(". -").rstrip(". ") or "unnamed"
