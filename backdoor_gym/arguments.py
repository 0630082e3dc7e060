"""Arguments of calls, checked before the work: type, range, and whether they are finite.

Each check raises ``DataError`` where the value does not pass; ``may_be_none`` lets None pass.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import DataError
from .wording import shown


def check_whole(name: str, value: Any, least: int = 0, most: int | None = None, *, may_be_none: bool = False) -> None:
    """An integer of that range; a bool is none."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    passes = whole and value >= least and (most is None or value <= most)
    limits = f"of at least {least}" + ("" if most is None else f" and at most {most}")
    _require(name, value, passes, f"a whole number {limits}", may_be_none)


def check_real(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, may_be_none: bool = False
) -> None:
    """A finite number of that range; a bool is none."""
    upwards = "" if math.isinf(least) else f" of at least {least:g}"
    limits = upwards if math.isinf(most) else f" from {least:g} to {most:g}"
    _require(name, value, is_finite(value) and least <= value <= most, f"a number{limits}", may_be_none)


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold; a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str, *, may_be_none: bool = False) -> None:
    """A value of that type, which ``what`` puts into words."""
    _require(name, value, isinstance(value, kind), what, may_be_none)


def check_options(name: str, value: Any) -> None:
    """None, or a mapping from texts."""
    check_kind(name, value, Mapping, "a dict", may_be_none=True)
    for key in value or {}:
        check_kind(f"a name in {name}", key, str, "a text")


def check_callable(name: str, value: Any, *, may_be_none: bool = False) -> None:
    """Something that can be called."""
    _require(name, value, callable(value), "a function", may_be_none)


def check_path(name: str, value: Any, *, may_be_none: bool = False) -> None:
    """A path or a name, as a text or a ``Path``."""
    check_kind(name, value, (str, Path), "a text or a Path", may_be_none=may_be_none)


def _require(name: str, value: Any, passes: bool, what: str, may_be_none: bool) -> None:
    if not passes and not (value is None and may_be_none):
        raise DataError(f"{name} must be {what}{' or None' if may_be_none else ''}, not {shown(value)}")
