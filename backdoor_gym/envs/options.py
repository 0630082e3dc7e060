"""The arguments of the environments: what each may be."""

from collections.abc import Mapping
from typing import Any

from ..arguments import check_path, check_real, check_whole
from ..devices import find_device
from ..errors import DataError, UnknownNameError, check_name
from ..masking.fill import check_fill
from ..neurons.layers import RESIDUAL_MODES
from ..session.session import GUARDS
from ..wording import shown

#: Units, strongest inputs (or similar neurons) of each, and edges that the observation may have room for: it is always full size.
MOST_UNITS, MOST_LINKS, MOST_EDGES = 1 << 20, 1 << 10, 1 << 24


class RenderModes(list[str]):
    """Render modes. ``gymnasium.make`` asks whether one is among them, and takes it for a text before anything else sees it."""

    def __contains__(self, mode: object) -> bool:
        if not isinstance(mode, str):
            raise UnknownNameError("render mode", mode, self)
        return super().__contains__(mode)


RENDER_MODES = RenderModes(("human", "rgb_array", "ansi"))


def infected_option(options: Any) -> Any:
    """The model that ``reset`` is asked for, or None.

    Raises:
        DataError: the options are no dict.
        UnknownNameError: there is another one.
    """
    if options is not None and not isinstance(options, Mapping):
        raise DataError(f"the options of a reset must be a dict, not {shown(options)}")
    for option in options or {}:
        check_name("reset option", option, ("infected",))
    return None if options is None else options.get("infected")


def check_arguments(options: Mapping[str, Any]) -> None:
    """Raise ``DataError`` or ``UnknownNameError`` where an argument is of a wrong type or out of range."""
    check_real("accuracy_budget", options["accuracy_budget"], 0, 1, may_be_none=True)
    for name in ("step_cost", "failure_cost"):
        check_real(name, options[name])
    for name, least, most in (
        ("max_failures", 1, None),
        ("score_samples", 0, None),
        ("connections", 0, MOST_LINKS),
        ("similar", 0, MOST_LINKS),
        ("gradients_every", 1, None),
    ):
        check_whole(name, options[name], least, most)
    for name, most in (("max_steps", None), ("clean_samples", None), ("max_units", MOST_UNITS)):
        check_whole(name, options[name], 1, most, may_be_none=True)
    links = options["connections"] + options["similar"]
    if links == 0:
        raise DataError("connections and similar cannot both be 0: the graph would have no edge")
    if links * (options["max_units"] or 0) > MOST_EDGES:
        raise DataError(f"max_units times connections and similar may be {MOST_EDGES} edges at most")
    check_name("residual mode", options["residual"], RESIDUAL_MODES)
    check_fill(options["fill"])
    check_name("guard", options["guard"], GUARDS)
    check_path("data", options["data"], may_be_none=True)
    find_device(options["device"])
    if options["render_mode"] is not None:
        check_name("render mode", options["render_mode"], RENDER_MODES)
