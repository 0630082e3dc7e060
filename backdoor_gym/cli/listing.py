"""``backdoor-gym list``."""

from typing import Annotated, Any

import typer

from .common import JsonOption, Output, QuietOption


def list_models(
    pattern: Annotated[str | None, typer.Argument(help="Pattern such as digits-test/*; default: an overview.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List infected models, architectures and attacks."""
    from ..attacks import ATTACKS
    from ..errors import UnknownNameError
    from ..models import family
    from ..models.catalogue import list_infected
    from ..networks import ARCHITECTURES

    output = Output(as_json, quiet)
    if pattern is not None:
        names = list_infected(pattern)
        if not names:
            raise UnknownNameError("pattern", pattern, ["digits-*", *(f"{split}/*" for split in family.SPLITS)])
        output.result(names)
        output.say("\n".join(names))
        return
    embedded = [name for name in list_infected() if "/" not in name]
    overview: dict[str, Any] = {
        "embedded": embedded,
        "families": {f"{split}/<seed>": _count_cached(split) for split in family.SPLITS},
        "architectures": sorted(ARCHITECTURES),
        "attacks": [*sorted(ATTACKS), "clean"],
    }
    output.result(overview)
    output.say(f"Embedded models   {', '.join(embedded)}")
    for name, cached in overview["families"].items():
        output.say(f"Made on demand    {name} ({cached} in the cache)")
    output.say(f"Architectures     {', '.join(overview['architectures'])}")
    output.say(f"Attacks           {', '.join(overview['attacks'])}")


def _count_cached(split: str) -> int:
    from ..models.family import cache_path

    return len(list(cache_path(f"{split}/0").parent.glob("*.safetensors")))
