"""The names of infected models: embedded ones, the procedural family, and files."""

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from glob import glob
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import check_callable, check_kind, check_options, check_path
from ..errors import DataError, ModelFileError, UnknownNameError
from ..infected import FORMAT, InfectedModel, refuse_module
from . import family
from .checkpoints import refuse_archive
from .files import WEIGHTS_ALONE, holds, is_pickle
from .foreign import Factory, load_foreign
from .own_images import Source
from .pretrained import CONFIG, WEIGHTS, is_pretrained, load_pretrained, load_timm

SUFFIX = ".safetensors"
#: What names of files with weights end in.
FILES = (SUFFIX, ".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl", ".npz", ".onnx", ".h5")
#: Of a name or a path; longer ones are none.
MOST_CHARACTERS = 4096


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
    check_kind("pattern", pattern, str, "a text")
    if len(pattern) > MOST_CHARACTERS:
        return []
    names = list(_embedded())
    for split in family.SPLITS:
        names.extend(f"{split}/{seed}" for seed in range(family.PATTERN_SEEDS))
    return [name for name in names if fnmatchcase(name, pattern)]


def resolve(name: str) -> list[str]:
    """The models that a name, a pattern (of names, or of ``.safetensors`` files) or a file stands for.

    Raises:
        UnknownNameError: nothing of that name.
        ModelFileError: a file that does not exist.
    """
    if _is_file(name):
        return [name]
    if len(name) > MOST_CHARACTERS or "\0" in name:
        raise UnknownNameError("infected model", name, _embedded())
    if any(sign in name for sign in "*?["):
        found = list_infected(name) or sorted(file for file in glob(os.path.expanduser(name)) if file.endswith(SUFFIX))
        if not found:
            known = [*_embedded(), *(f"{split}/*" for split in family.SPLITS)]
            raise UnknownNameError("pattern", name, known, f"or one of files that exist, {SUFFIX}")
        return found
    if name in _embedded() or family.is_member(name):
        return [name]
    if name.endswith(FILES) or "\\" in name or name.startswith((".", "/", "~")):
        raise ModelFileError(f"there is no file {name}")
    known = [*_embedded(), *(f"{split}/0" for split in family.SPLITS)]
    raise UnknownNameError(
        "infected model", name, known, "a file must exist, or end in .safetensors; hf:owner/name is read from the Hub"
    )


def load_infected(
    name: str | Path,
    data: str | None = None,
    *,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    module: Factory | None = None,
    clean: Source | None = None,
    test: Source | None = None,
    clean_images: int | None = None,
    image_size: tuple[int, int] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    timm: str | None = None,
) -> InfectedModel:
    """An infected model by name, file or folder. Nothing that came with a file is run.

    Args:
        name: of an embedded model, of the family (``digits-test/3``: trained now if it is not cached), or a file: one that
            ``InfectedModel.save`` wrote, or anybody's weights (``.safetensors``, ``.pt``, ``.pth``, ``.tar``); the folder of an
            image classifier of transformers or timm, or ``hf:owner/name`` on the Hub (see ``zoo.pretrained.load_pretrained``).
        data: data set to read a file's images from, instead of the one it names.
        architecture: for anybody's weights, as all that follow (see ``zoo.foreign.load_foreign``): the architecture.
        options: its options.
        module: your own network instead.
        clean: the defender's images.
        test: images to score on.
        clean_images: how many of ``clean`` are drawn.
        image_size: height and width that the images of folders are resized to.
        preprocess: from images in [0, 1] to what the network takes.
        timm: the name of a network of timm that the weights belong to.

    Raises:
        UnknownNameError: no such name.
        DataError: ``data`` for what names no data set.
        ModelFileError, WeightsError, DataError: a file that cannot be used (see ``InfectedModel.load``, ``load_foreign``,
            ``load_pretrained`` and ``load_timm``).
    """
    refuse_module(name)
    check_path("the name of an infected model", name)
    check_path("data", data, may_be_none=True)
    check_kind("architecture", architecture, str, "a name", may_be_none=True)
    check_options("options", options)
    check_callable("preprocess", preprocess, may_be_none=True)
    check_kind("timm", timm, str, "a name", may_be_none=True)
    text, data = str(name), None if data is None else str(data)
    own: dict[str, Any] = {
        "architecture": architecture,
        "options": options or None,
        "module": module,
        "clean": clean,
        "test": test,
        "clean_images": clean_images,
        "image_size": image_size,
        "preprocess": preprocess,
    }
    given = [key for key, value in {**own, "timm": timm}.items() if value is not None]
    path = Path(os.path.expanduser(text))
    if data is not None and (is_pretrained(text) or (_is_file(text) and _is_foreign(path, bool(given)))):
        raise DataError(
            f"{text} names no images that others could stand for: clean ones are given with --clean (clean=), not --data (data=)"
        )
    if is_pretrained(text):
        return load_pretrained(text, **own, timm=timm)
    if _is_file(text):
        refuse_archive(path)
    if _is_file(text) and _is_foreign(path, bool(given)):
        return load_foreign(path, **own) if timm is None else load_timm(path, timm, **own)
    if os.path.isdir(path) and text not in _embedded() and not family.is_member(text):
        raise ModelFileError(
            f"{text} is a folder without {CONFIG}: a network of transformers or timm has it beside {WEIGHTS}"
        )
    found = resolve(text)
    if given:
        raise DataError(
            f"{text} is an infected model of this package, complete as it is; {given[0]} is for other weights"
        )
    if text in _embedded():
        return InfectedModel.load(_embedded()[text], data)
    if family.is_member(text) and data is not None:
        raise DataError(f"{text} is made of the images that its name says; leave --data (data=) out")
    if family.is_member(text):
        return family.load(text)
    if found != [text]:
        raise UnknownNameError("infected model", text, found, "a pattern stands for several models; name one")
    return InfectedModel.load(path, data)


def max_neurons(name: str) -> int | None:
    """The most neurons that a model can have, where its family declares it; None where it must be loaded."""
    return family.MAX_NEURONS if family.is_member(name) else None


def check_complete(name: str) -> None:
    """Find out before the work that a model needs more than its name to be loaded.

    Raises:
        DataError: a file of weights alone, or a folder of transformers or timm.
    """
    path = Path(os.path.expanduser(name))
    if is_pretrained(name) or (_is_file(name) and _is_foreign(path, False)):
        raise DataError(
            f"{name} holds a network alone, and no clean images: load it first, with load_infected({name!r}, clean=..., and "
            "architecture= or module= where it is weights alone), and give the model; or save that, and name its file"
        )


def _is_foreign(path: Path, described: bool) -> bool:
    """Whether a file holds anybody's weights; one that nothing tells of does where the caller has described them."""
    return is_pickle(path) or holds(path) in WEIGHTS_ALONE or (described and holds(path) != FORMAT)


def _is_file(name: str) -> bool:
    return os.path.isfile(os.path.expanduser(name))  # of any text: of a user that is not there, or of 5,000 characters
