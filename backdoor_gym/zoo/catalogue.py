"""The names of infected models: embedded ones, the procedural family, and files."""

from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path

from ..errors import ModelFileError, UnknownNameError
from ..infected import InfectedModel
from . import family

SUFFIX = ".safetensors"


@cache
def _embedded() -> dict[str, Path]:
    folder = resources.files("backdoor_gym") / "embedded"
    return {
        Path(entry.name).stem: Path(str(entry))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(SUFFIX)
    }


def list_infected(pattern: str = "*") -> list[str]:
    """Names that match a pattern of the shell's kind: embedded models, then the family's seeds 0 to 999."""
    names = list(_embedded())
    for split in family.SPLITS:
        names.extend(f"{split}/{seed}" for seed in range(family.PATTERN_SEEDS))
    return [name for name in names if fnmatchcase(name, pattern)]


def resolve(name: str) -> list[str]:
    """The models that a name, a pattern or a file stands for.

    Raises:
        UnknownNameError: nothing of that name.
        ModelFileError: a file that does not exist.
    """
    if _is_file(name):
        return [name]
    if any(sign in name for sign in "*?["):
        found = list_infected(name)
        if not found:
            raise UnknownNameError("pattern", name, [*_embedded(), *(f"{split}/*" for split in family.SPLITS)])
        return found
    if name in _embedded() or family.is_member(name):
        return [name]
    if name.endswith(SUFFIX) or "\\" in name or name.startswith((".", "/", "~")):
        raise ModelFileError(f"there is no file {name}")
    known = [*_embedded(), *(f"{split}/0" for split in family.SPLITS)]
    raise UnknownNameError("infected model", name, known, "a file must exist, or end in .safetensors")


def load_infected(name: str | Path, data: str | None = None) -> InfectedModel:
    """An infected model by name or file.

    Args:
        name: of an embedded model, of the family (``digits-test/3``: trained now if it is not cached), or a file.
        data: data set to read a file's images from, instead of the one it names.

    Raises:
        UnknownNameError: no such name.
        ModelFileError, WeightsError, DataError: a file that cannot be used (see ``InfectedModel.load``).
    """
    text = str(name)
    if text in _embedded():
        return InfectedModel.load(_embedded()[text])
    if family.is_member(text):
        return family.load(text)
    found = resolve(text)
    if found != [text]:
        raise UnknownNameError("infected model", text, found, "a pattern stands for several models; name one")
    return InfectedModel.load(Path(text).expanduser(), data)


def max_neurons(name: str) -> int | None:
    """The most neurons that a model can have, where its family declares it; None where it must be loaded."""
    return family.MAX_NEURONS if family.is_member(name) else None


def _is_file(name: str) -> bool:
    return Path(name).expanduser().is_file()
