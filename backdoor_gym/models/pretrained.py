"""Image classifiers of transformers and timm: a local folder, or a repository of the Hub.

A folder is plain JSON and safetensors. Code that it names is never imported, a pickle in it never opened, and nothing but a name
that begins with ``hf:`` reaches the Hub.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..data.datasets import LabelledImages
from ..data.folders import is_image_folder
from ..data.own_images import Source
from ..errors import DataError, ModelFileError
from ..files.schemas import plain
from ..files.sizes import check_pass
from ..files.tensors import check_names, is_pickle, read_safetensors
from ..wording import first_line, shown
from .checkpoint_spec import CheckpointSpec
from .described import CONFIG, library
from .foreign import behind
from .from_timm import make_timm
from .from_transformers import make_transformers, values_in
from .image_settings import PREPROCESSOR, image_size, in_words, normalisation, timm_settings
from .infected import InfectedModel
from .layout import WEIGHTS, Layout

HUB = "hf:"
INDEX = f"{WEIGHTS}.index.json"
#: What is fetched of a repository of the Hub.
FETCHED = (CONFIG, PREPROCESSOR, WEIGHTS, INDEX, "model-?????-of-?????.safetensors")
#: Bytes of a JSON file: that of an image classifier has some thousands, and a name for each class.
MOST_BYTES = 16 << 20


def is_pretrained(name: str) -> bool:
    """Whether a name is ``hf:owner/name`` or a folder with a ``config.json``."""
    return name.startswith(HUB) or os.path.isfile(os.path.join(os.path.expanduser(name), CONFIG))


def load_pretrained(name: str, spec: CheckpointSpec) -> InfectedModel:
    """The infected model of a folder with ``config.json`` and ``model.safetensors``, or of ``hf:owner/name``.

    Its own preprocessing gives image size, mean and std, unless they are given. Where the subfolders of clean or test images
    have the names of the network's classes, labels are the network's.

    Args:
        name: the folder, or the repository of the Hub, with ``@revision`` after it if need be.
        spec: clean images; nothing that says which network it is.

    Raises:
        ModelFileError: no such folder or repository, or one that describes no image classifier.
        WeightsError: weights that do not fit the description.
        DataError: clean images missing or that do not fit, a preprocessing that is not understood, or an extra not installed.
    """
    for_weights = [argument for argument in spec.said if argument in ("architecture", "options", "module", "timm")]
    if for_weights:
        raise DataError(f"{name} says itself which network it is; {for_weights[0]} is for weights alone")
    spec.check_clean(name)
    folder = _fetch(name) if name.startswith(HUB) else Path(name).expanduser()
    config = _read_json(folder / CONFIG)
    _check_kinds(config, folder)
    of_timm = "architecture" in config
    settings: Mapping[str, Any] | None = timm_settings(config)
    if not of_timm:
        settings = _read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    size = spec.image_size or image_size(settings, config, folder)
    preprocess = normalisation(settings, folder) if spec.preprocess is None else spec.preprocess
    weights = _read_weights(folder)
    made = (make_timm if of_timm else make_transformers)(config, weights, folder)
    clean, scoring = spec.read_images(size)
    check_pass(made.planned, clean.images.shape[1:])
    if spec.test is not None and scoring is not None:
        scoring = _relabelled(spec.test, scoring, made.labels)
    facts = {
        "unread": made.unread,
        "unused": made.unused,
        "preprocessing": in_words(preprocess, size) if spec.preprocess is None else None,
    }
    texts = {file: (folder / file).read_bytes() for file in (CONFIG, PREPROCESSOR) if (folder / file).is_file()}
    kept = {key: value for key, value in weights.items() if not value.is_floating_point() or key in made.unused}
    return behind(
        preprocess,
        made.network,
        _relabelled(spec.clean, clean, made.labels),
        scoring,
        facts={key: value for key, value in facts.items() if value},
        # The name of a folder, not of where it lies; a repository's without its owner and revision.
        name=name.partition("@")[0].rpartition("/")[2] if name.startswith(HUB) else folder.resolve().name,
        checkpoint=name,
        layout=Layout(texts, {key: value.dtype for key, value in weights.items()}, kept, made.prefix),
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder.

    Raises:
        ModelFileError: none there, one that is damaged or a pickle, or an index that names a file elsewhere.
    """
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        files = sorted({str(name) for name in values_in(_read_json(folder / INDEX).get("weight_map"))})
        if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
            raise ModelFileError(f"{folder / INDEX} must name files of its own folder, such as {WEIGHTS}")
    weights: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ModelFileError(
                f"there is no {file} in {folder}; weights are read as safetensors alone. A pytorch_model.bin is a pickle and "
                "never opened: where it can do no harm, save the network anew with save_pretrained(folder), which writes "
                f"{WEIGHTS}"
            )
        if is_pickle(path):
            raise ModelFileError(f"{path} is a pickle, whatever its name says, and is not opened")
        weights |= read_safetensors(path)[0]
        check_names(path, weights)
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        content = msgspec.json.decode(path.read_bytes())
        plain(content)
    except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _check_kinds(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ``ModelFileError`` where an entry of a config that is looked into is of another kind than it should be."""
    for key in ("id2label", "model_args", "pretrained_cfg"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ModelFileError(f"{folder / CONFIG}: {key} must be an object, not {shown(config[key])}")
    for key in config.get("id2label") or {}:
        if not (str(key).isdecimal() and len(str(key)) < 10):
            raise ModelFileError(f"{folder / CONFIG}: id2label must name the class of each number, not of {shown(key)}")
    numbers = Counter(map(int, config.get("id2label") or {}))
    if twice := [number for number, count in numbers.items() if count > 1]:
        raise ModelFileError(f"{folder / CONFIG}: id2label names class {twice[0]} more than once")


def _relabelled(source: Source | None, images: LabelledImages, labels: Mapping[int, str]) -> LabelledImages:
    """Images with the network's labels, where they are of a folder whose subfolders have the names of the network's classes.

    Raises:
        DataError: a name is that of several classes.
    """
    folder = Path(source).expanduser() if isinstance(source, str | Path) else None
    if folder is None or not folder.is_dir() or not is_image_folder(folder):
        return images
    places: dict[str, list[int]] = {}
    for place, name in labels.items():
        places.setdefault(_alike(name), []).append(place)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not all(_alike(name) in places for name in names):
        return images
    for name in names:
        if len(places[_alike(name)]) > 1:
            raise DataError(
                f"the subfolder {name} of {folder} may be any of the classes {places[_alike(name)]} of the network, which have the "
                "same name: name all subfolders by the numbers of their classes"
            )
    # Where all names are numbers, images were read with these as labels.
    numbered = all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)
    new = {int(name) if numbered else place: places[_alike(name)][0] for place, name in enumerate(names)}
    return LabelledImages(images.images, torch.tensor([new[label] for label in images.labels.tolist()]))


def _alike(name: str) -> str:
    return re.sub(r"[\s_]", "", name).lower()


def _fetch(name: str) -> Path:
    """The folder that a repository of the Hub is kept in, of which only JSON and safetensors are fetched.

    Raises:
        ModelFileError: no such repository, or the Hub cannot be reached and it was not fetched before.
    """
    parts = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if parts is None:
        raise ModelFileError(f"a repository of the Hub is named hf:owner/name or hf:owner/name@revision, not {name}")
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(parts[1], revision=parts[2], allow_patterns=list(FETCHED)))
    except Exception as error:  # of the network, of the Hub, of the disk
        raise ModelFileError(
            f"{name} cannot be fetched from the Hub and was not fetched before ({first_line(error)}); a local folder needs no Hub"
        ) from error
