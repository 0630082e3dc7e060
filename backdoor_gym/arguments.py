"""Arguments of calls, checked before anything is done with them: their type, whether they are finite, and their range."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .errors import DataError
from .wording import shown


def check_whole(name: str, value: Any, least: int = 0, most: int | None = None, *, may_be_none: bool = False) -> None:
    """Raise ``DataError`` unless it is an integer of that range; a bool is none."""
    if value is None and may_be_none:
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" + ("" if most is None else f" and at most {most}")
        raise DataError(
            f"{name} must be {'None or ' if may_be_none else ''}a whole number {limits}, not {shown(value)}"
        )


def check_real(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, may_be_none: bool = False
) -> None:
    """Raise ``DataError`` unless it is a finite number of that range; a bool is none."""
    if value is None and may_be_none:
        return
    if not is_finite(value) or not least <= value <= most:
        limits = (
            ""
            if math.isinf(least)
            else f" of at least {least:g}"
            if math.isinf(most)
            else f" from {least:g} to {most:g}"
        )
        raise DataError(f"{name} must be {'None or ' if may_be_none else ''}a number{limits}, not {shown(value)}")


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str, *, may_be_none: bool = False) -> None:
    """Raise ``DataError`` unless it is of that type, which ``what`` says in words."""
    if not (value is None and may_be_none) and not isinstance(value, kind):
        raise DataError(f"{name} must be {what}{' or None' if may_be_none else ''}, not {shown(value)}")


def check_options(name: str, value: Any) -> None:
    """Raise ``DataError`` unless it is None, or a mapping from texts."""
    check_kind(name, value, Mapping, "a dict", may_be_none=True)
    for key in value or {}:
        check_kind(f"a name in {name}", key, str, "a text")


def check_option_kinds(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ``DataError`` where an option is a number, a text or a bool for ``function`` and here something else."""
    kinds = {
        int: (Integral, "a whole number"),
        float: (Real, "a number"),
        str: (str, "a text"),
        bool: (bool, "true or false"),
    }
    hints = get_type_hints(function)
    for name, value in options.items():
        wanted = set(get_args(hints.get(name)) or (hints.get(name),)) - {type(None)}
        if len(wanted) != 1 or value is None:
            continue
        kind, said = kinds.get(wanted.pop(), (object, ""))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (Integral, Real)):
            raise DataError(f"the option {name} of {what} must be {said}, not {shown(value)}")


def check_callable(name: str, value: Any, *, may_be_none: bool = False) -> None:
    """Raise ``DataError`` unless it can be called."""
    if not (value is None and may_be_none) and not callable(value):
        raise DataError(f"{name} must be a function{' or None' if may_be_none else ''}, not {shown(value)}")


def check_path(name: str, value: Any, *, may_be_none: bool = False) -> None:
    """Raise ``DataError`` unless it is the path or the name of something, as a text or a ``Path``."""
    check_kind(name, value, (str, Path), "a text or a Path", may_be_none=may_be_none)
