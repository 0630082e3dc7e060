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

from ..arguments import check_kind, check_path
from ..data.own_images import Source
from ..errors import DataError, ModelFileError, UnknownNameError
from ..files.checkpoints import refuse_archive
from ..files.tensors import WEIGHTS_ALONE, holds, is_pickle
from . import family
from .checkpoint_spec import CheckpointSpec, Factory
from .described import CONFIG
from .foreign import load_foreign
from .from_timm import load_timm
from .infected import InfectedModel, refuse_module
from .infected_files import FORMAT
from .layout import WEIGHTS
from .pretrained import is_pretrained, load_pretrained

SUFFIX = ".safetensors"
#: What names of files with weights end in.
FILES = (SUFFIX, ".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl", ".npz", ".onnx", ".h5")
#: Of a name or a path; longer ones are none.
MOST_CHARACTERS = 4096


@cache
def _embedded() -> dict[str, Path]:
    files = (resources.files("backdoor_gym") / "embedded").iterdir()
    paths = sorted(Path(str(file)) for file in files if file.name.endswith(SUFFIX))
    return {path.stem: path for path in paths}


def list_infected(pattern: str = "*") -> list[str]:
    """Names that match a pattern of the shell's kind: embedded models, then the family's seeds 0 to 999.

    Examples:
        >>> from backdoor_gym import list_infected
        >>> list_infected("digits-b*")
        ['digits-badnets', 'digits-blended']
    """
    check_kind("pattern", pattern, str, "a text")
    if len(pattern) > MOST_CHARACTERS:
        return []
    members = (f"{split}/{seed}" for split in family.SPLITS for seed in range(family.PATTERN_SEEDS))
    return [name for name in (*_embedded(), *members) if fnmatchcase(name, pattern)]


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
        models = list_infected(name) or sorted(file for file in glob(os.path.expanduser(name)) if file.endswith(SUFFIX))
        if not models:
            known = [*_embedded(), *(f"{split}/*" for split in family.SPLITS)]
            raise UnknownNameError("pattern", name, known, f"or one of files that exist, {SUFFIX}")
        return models
    if _is_named(name):
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
            image classifier of transformers or timm, or ``hf:owner/name`` on the Hub.
        data: data set to read a file's images from, instead of the one it names.
        architecture: for anybody's weights, as all that follow (see ``CheckpointSpec``): name of an architecture.
        options: of the architecture, or of timm's network.
        module: your own network instead.
        clean: the defender's images.
        test: images to score on.
        clean_images: how many of ``clean`` are drawn.
        image_size: height and width that the images of folders are resized to.
        preprocess: from images in [0, 1] to what the network takes.
        timm: name of a network of timm.

    Raises:
        UnknownNameError: no such name.
        DataError: ``data`` for what names no data set.
        ModelFileError, WeightsError, DataError: a file that cannot be used (see ``InfectedModel.load``, ``load_foreign``,
            ``load_pretrained`` and ``load_timm``).

    Examples:
        >>> from backdoor_gym import load_infected
        >>> load_infected("digits-badnets").facts["attack"]
        'badnets'
    """
    refuse_module(name)
    check_path("the name of an infected model", name)
    check_path("data", data, may_be_none=True)
    spec = CheckpointSpec(architecture, options, module, clean, test, clean_images, image_size, preprocess, timm)
    return load_specified(str(name), None if data is None else str(data), spec)


def load_specified(name: str, data: str | None, spec: CheckpointSpec) -> InfectedModel:
    """As ``load_infected`` does it."""
    path = Path(os.path.expanduser(name))
    if data is not None and is_foreign(name, spec):
        raise DataError(
            f"{name} names no images that others could stand for: clean ones are given with --clean (clean=), not --data (data=)"
        )
    if is_pretrained(name):
        return load_pretrained(name, spec)
    if is_foreign(name, spec):
        return load_foreign(path, spec) if spec.timm is None else load_timm(path, spec.timm, spec)
    if os.path.isdir(path) and not _is_named(name):
        raise ModelFileError(
            f"{name} is a folder without {CONFIG}: a network of transformers or timm has it beside {WEIGHTS}"
        )
    models = resolve(name)
    if spec.said:
        raise DataError(
            f"{name} is an infected model of this package, complete as it is; {spec.said[0]} is for other weights"
        )
    if name in _embedded():
        return InfectedModel.load(_embedded()[name], data)
    if family.is_member(name):
        if data is not None:
            raise DataError(f"{name} is made of the images that its name says; leave --data (data=) out")
        return family.load(name)
    if models != [name]:
        raise UnknownNameError("infected model", name, models, "a pattern stands for several models; name one")
    return InfectedModel.load(path, data)


def is_foreign(name: str, spec: CheckpointSpec) -> bool:
    """Whether a name stands for anybody's weights or network, to which a specification belongs.

    Raises:
        ModelFileError: it is an archive.
    """
    if is_pretrained(name):
        return True
    if not _is_file(name):
        return False
    path = Path(os.path.expanduser(name))
    refuse_archive(path)
    return is_pickle(path) or holds(path) in WEIGHTS_ALONE or (bool(spec.said) and holds(path) != FORMAT)


def check_complete(name: str) -> None:
    """Find out before the work that a model needs more than its name to be loaded.

    Raises:
        DataError: a file of weights alone, or a folder of transformers or timm.
        ModelFileError: an archive.
    """
    if is_foreign(name, CheckpointSpec()):
        raise DataError(
            f"{name} holds a network alone, and no clean images: load it first, with load_infected({name!r}, clean=..., and "
            "architecture= or module= where it is weights alone), and give the model; or save that, and name its file"
        )


def max_neurons(name: str) -> int | None:
    """The most neurons that a model can have, where its family declares it; None where it must be loaded."""
    return family.max_neurons(name) if family.is_member(name) else None


def _is_named(name: str) -> bool:
    return name in _embedded() or family.is_member(name)


def _is_file(name: str) -> bool:
    return os.path.isfile(os.path.expanduser(name))  # of any text: of a user that is not there, or of 5,000 characters
