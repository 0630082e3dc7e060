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
    from ..models.catalogue import list_infected
    from ..models.family import SPLITS, cache_path
    from ..networks import ARCHITECTURES

    output = Output(as_json, quiet)
    if pattern is not None:
        names = list_infected(pattern)
        if not names:
            raise UnknownNameError("pattern", pattern, ["digits-*", *(f"{split}/*" for split in SPLITS)])
        output.result(names)
        output.say("\n".join(names))
        return
    cached = {split: len(list(cache_path(f"{split}/0").parent.glob("*.safetensors"))) for split in SPLITS}
    overview: dict[str, Any] = {
        "embedded": [name for name in list_infected() if "/" not in name],
        "families": {f"{split}/<seed>": count for split, count in cached.items()},
        "architectures": sorted(ARCHITECTURES),
        "attacks": [*sorted(ATTACKS), "clean"],
    }
    output.result(overview)
    output.say(f"Embedded models   {', '.join(overview['embedded'])}")
    for name, count in overview["families"].items():
        output.say(f"Made on demand    {name} ({count} in the cache)")
    output.say(f"Architectures     {', '.join(overview['architectures'])}")
    output.say(f"Attacks           {', '.join(overview['attacks'])}")
