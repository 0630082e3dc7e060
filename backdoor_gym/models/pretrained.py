"""Image classifiers of transformers and timm: a local folder, a repository of the Hub, or a state dict of a timm network.

A folder is plain JSON and safetensors. Code that it names is never imported, a pickle in it never opened, and nothing but a name
that begins with ``hf:`` reaches the Hub.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.datasets import LabelledImages
from ..data.folders import is_image_folder
from ..data.own_images import Source, all_images, own_images
from ..data.pictures import MOST_SIDE
from ..errors import BackdoorGymError, DataError, ModelFileError, WeightsError
from ..files.checkpoints import Checkpoint, read_checkpoint
from ..files.fitting import COUNTER, fit_weights
from ..files.schemas import plain
from ..files.sizes import counted, within
from ..files.tensors import check_names, is_pickle, read_safetensors
from ..networks.preprocessing import Normalise, Preprocessed
from ..wording import shown
from ..writing import beside
from .foreign import Factory, differing_length, load_foreign
from .infected import InfectedModel, check_finite, check_preprocess

HUB = "hf:"
CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
#: What is fetched of a repository of the Hub.
FETCHED = (CONFIG, PREPROCESSOR, WEIGHTS, INDEX, "model-?????-of-?????.safetensors")
#: Entries of a config that say how a network is run, not what it is; some of them would have code fetched.
HOW = {
    "attn_implementation", "auto_map", "dtype", "experts_implementation", "output_attentions", "output_hidden_states",
    "return_dict", "torch_dtype", "torchscript", "transformers_weights", "use_return_dict",
}  # fmt: skip
#: Arguments of ``timm.create_model`` that say where weights come from (a pickle, the Hub) or what it gives instead of logits.
NOT_FROM_A_FILE = {
    "cache_dir", "checkpoint_path", "exportable", "features_only", "no_jit", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "scriptable",
}  # fmt: skip
#: Bytes of a JSON file: that of an image classifier has some thousands, and a name for each class.
MOST_BYTES = 16 << 20
#: Layers of a kind that a config may ask for: more would take for ever before their weights are compared.
MOST_LAYERS = 1000
#: Numbers that a network may hold beyond twice those in its files, before it is built.
SPARE = 1 << 24


class FlipChannels(nn.Module):
    """RGB to BGR."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1)


@dataclass(frozen=True)
class Layout:
    """The form that a network came in, for writing a repaired one in the same.

    Args:
        texts: the JSON files beside the weights, by name.
        dtypes: of each tensor in the files of weights.
        kept: tensors there that the network may have no place for, such as the indices that older releases stored.
        prefix: what stands before the network's own names there; transformers puts its own in front.
    """

    texts: Mapping[str, bytes]
    dtypes: Mapping[str, torch.dtype] = field(repr=False)
    kept: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    prefix: str = ""

    def save(self, folder: str | Path, network: nn.Module) -> list[Path]:
        """Write ``model.safetensors``, with the names and dtypes it came with, and copies of the JSON files.

        Raises:
            WriteError: the folder cannot be written.
        """
        folder = Path(folder)
        with beside(folder) as new:
            tensors = {
                name: value.detach().cpu().to(self.dtypes.get(name, value.dtype)).contiguous()
                for name, value in {**self.kept, **self._named(new, network)}.items()
            }
            save_file(tensors, new / WEIGHTS, {"format": "pt"})
            for name, text in self.texts.items():
                (new / name).write_bytes(text)
        return [folder / name for name in self.files]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that ``save`` writes."""
        return (WEIGHTS, *self.texts)

    def _named(self, folder: Path, network: Any) -> Mapping[str, Tensor]:
        if not hasattr(network, "save_pretrained"):
            return {f"{self.prefix}{name}": value.clone() for name, value in network.state_dict().items()}
        # Its own modules have other names than its files, from release to release.
        with _quiet(), TemporaryDirectory(dir=folder) as spare:
            network.save_pretrained(spare, max_shard_size="1000GB")
            return load_file(Path(spare) / WEIGHTS)


def is_pretrained(name: str) -> bool:
    """Whether a name is ``hf:owner/name`` or a folder with a ``config.json``."""
    return name.startswith(HUB) or os.path.isfile(os.path.join(os.path.expanduser(name), CONFIG))


def load_pretrained(
    name: str,
    *,
    clean: Source | None = None,
    test: Source | None = None,
    clean_images: int | None = None,
    image_size: tuple[int, int] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    **others: Any,
) -> InfectedModel:
    """The infected model of a folder with ``config.json`` and ``model.safetensors``, or of ``hf:owner/name``.

    Its own preprocessing gives image size, mean and std, unless they are given. Where the subfolders of clean or test images
    have the names of the network's classes, labels are the network's.

    Args:
        name: the folder, or the repository of the Hub, with ``@revision`` after it if need be.
        clean: the defender's images, in any form that ``own_images`` takes.
        test: images to score on; by default the rest of a named data set, and none otherwise.
        clean_images: how many of ``clean`` are drawn.
        image_size: height and width that images of folders and named data sets are resized to.
        preprocess: from images in [0, 1] to what the network takes.
        **others: what other weights need, all of it None.

    Raises:
        ModelFileError: no such folder or repository, or one that describes no image classifier.
        WeightsError: weights that do not fit the description.
        DataError: clean images missing or that do not fit, a preprocessing that is not understood, or an extra not installed.
    """
    given = [key for key, value in others.items() if value is not None]
    if given:
        raise DataError(f"{name} says itself which network it is; {given[0]} is for weights alone")
    if clean is None:
        raise DataError(
            f"{name} brings no images: name clean ones with --clean (clean=), the .npz, the folder or the data set that they "
            "are in"
        )
    folder = _fetch(name) if name.startswith(HUB) else Path(name).expanduser()
    config = _read_json(folder / CONFIG)
    _check_kinds(config, folder)
    of_timm = "architecture" in config
    settings = _timm_settings(config) if of_timm else _preprocessor(folder)
    size = image_size or _size(settings, config, folder)
    if preprocess is None:
        preprocess = _normalisation(settings, folder)
        said = _in_words(preprocess, size)
    else:
        said = None
    weights = _read_weights(folder)
    made = _of_timm(config, weights, folder) if of_timm else _of_transformers(config, weights, folder)
    texts = {file: (folder / file).read_bytes() for file in (CONFIG, PREPROCESSOR) if (folder / file).is_file()}
    given_images = own_images(clean, clean_images, size)
    scoring = given_images.rest if test is None else _relabelled(test, all_images(test, size), made.labels)
    images = _relabelled(clean, given_images.images, made.labels)
    full = made.network
    if preprocess is not None:
        check_preprocess(preprocess, images.images[:2])
        full = Preprocessed(preprocess, full)
    # The name of a folder, not of where it lies; a repository's without its owner and revision.
    title = name.partition("@")[0].rpartition("/")[2] if name.startswith(HUB) else folder.resolve().name
    facts = {"unread": made.unread, "unused": made.unused, "preprocessing": said}
    kept = {key: value for key, value in weights.items() if not value.is_floating_point() or key in made.unused}
    return InfectedModel(
        full,
        images,
        scoring,
        facts={key: value for key, value in facts.items() if value},
        name=title,
        checkpoint=name,
        layout=Layout(texts, {key: value.dtype for key, value in weights.items()}, kept, made.prefix),
    )


def load_timm(
    path: str | Path,
    name: str,
    *,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    module: Factory | None = None,
    image_size: tuple[int, int] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    **own: Any,
) -> InfectedModel:
    """The infected model of a state dict of timm's network of that name, normalised as timm does it unless that is given.

    Args:
        path: of the weights, in any form that ``read_checkpoint`` takes.
        name: such as ``resnet18``; its numbers of classes and channels are those of the weights.
        architecture: None: a checkpoint belongs to one network.
        options: of ``timm.create_model``, such as ``{"img_size": 32}``.
        module: None, too.
        image_size: height and width that images of folders and named data sets are resized to; by default timm's.
        preprocess: from images in [0, 1] to what the network takes.
        **own: as ``load_foreign`` takes it.

    Raises:
        DataError: no such network, or timm not installed; else as ``load_foreign`` does.
    """
    if architecture is not None or module is not None:
        raise DataError(
            "a checkpoint belongs to a network of timm, to an architecture of this package or to a module of yours"
        )
    checkpoint = read_checkpoint(path)
    options = dict(options or {})
    counts = {"num_classes": 0, "in_chans": 1}  # and the axis of the tensors that each of them decides
    for key, axis in counts.items():
        if key in options:
            continue
        two, three = (_shapes(name, {**options, key: count}) for count in (2, 3))
        found = differing_length(two, three, checkpoint, axis)
        options |= {} if found is None else {key: found}
    network = _create(name, options)
    shapes = {key: value.shape for key, value in checkpoint.weights.items()}
    _check_size(network, shapes, checkpoint.path)
    settings = _timm_settings({"pretrained_cfg": getattr(network, "pretrained_cfg", None) or {}})
    size = image_size or _size(settings, {}, checkpoint.path)
    said = None
    if preprocess is None:
        preprocess = _normalisation(settings, checkpoint.path)
        if isinstance(preprocess, Normalise) and len(preprocess.mean) != options.get("in_chans", 3):
            raise DataError(
                f"timm normalises {len(preprocess.mean)} channels and the network takes {options.get('in_chans', 3)}: say with "
                "--mean and --std (preprocess=) what it was trained with"
            )
        said = _in_words(preprocess, size)
    model = load_foreign(checkpoint.path, module=network, image_size=size, preprocess=preprocess, **own)
    model.facts["preprocessing"] = said
    return model


class _Made(NamedTuple):
    """A network that was built, with its weights in it.

    Attributes:
        network: from what the preprocessing makes of images to logits, or an answer that holds them.
        labels: the number of each class, by name.
        unread: code that the folder names and that was not touched.
        unused: tensors that the network has no place for.
        prefix: see ``Layout``.
    """

    network: nn.Module
    labels: dict[str, int]
    unread: list[str]
    unused: list[str]
    prefix: str = ""


def _of_transformers(config: Mapping[str, Any], weights: dict[str, Tensor], folder: Path) -> _Made:
    transformers = _library("transformers")
    kind, chosen = _classifier(config, folder)
    unread = sorted({str(name) for name in _values(config.get("auto_map", {}))})
    if config.get("quantization_config"):
        raise ModelFileError(f"{folder} holds quantised weights; a network is repaired as the floats it was made of")
    _check_depth(config, folder)
    refused = sorted(NOT_FROM_A_FILE & (config.get("model_args") or {}).keys())
    if refused:
        raise ModelFileError(f"{folder / CONFIG} says {refused[0]}: weights come out of {WEIGHTS} alone")
    longest = max((length for value in weights.values() for length in value.shape), default=0)
    if isinstance(config.get("num_labels"), int | float) and config["num_labels"] > longest:
        raise ModelFileError(
            f"{folder / CONFIG} says {config['num_labels']} classes, and the weights are of no so many"
        )
    floats = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    try:
        with _quiet():
            described = transformers.AutoConfig.for_model(kind, **_plain_config(config))
            described.architectures = [chosen]
            automatic = transformers.AutoModelForImageClassification
            # A file says how large the network is: nothing is allocated before that is known.
            planned = within(lambda: automatic.from_config(described, trust_remote_code=False), weights)
            _check_size(planned, {key: value.shape for key, value in weights.items()}, folder)
            network, info = type(planned).from_pretrained(
                None, config=described, state_dict=floats, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except BackdoorGymError:
        raise
    except Exception as error:  # whatever a file says, reading it must end in one clear line
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelFileError(f"{folder / CONFIG} does not describe a {chosen} that can be built ({reason})") from error
    missing = [key for key in info["missing_keys"] if not key.endswith(COUNTER)]
    differing = [  # releases before 5 tell the names alone
        told if isinstance(told, str) else f"{told[0]} {tuple(told[1])} instead of {tuple(told[2])}"
        for told in sorted(info["mismatched_keys"])
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(sorted(found)[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("of another shape", differing))
        if found
    ]
    if problems:
        raise WeightsError(
            f"the weights in {folder} are not those of the {chosen} that it describes: {'; '.join(problems)}"
        )
    check_finite(network)
    named = config.get("id2label") or {}
    labels = {str(name): int(key) for key, name in named.items()}
    return _Made(network.float(), labels, unread, sorted(info["unexpected_keys"]))


def _classifier(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """The type of network that a config names, and its class of transformers, which must be an image classifier."""
    known = importlib.import_module(
        "transformers.models.auto.modeling_auto"
    ).MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    kind = config.get("model_type")
    classes = known.get(kind, ()) if isinstance(kind, str) else ()
    classes = (classes,) if isinstance(classes, str) else tuple(classes)
    said = config.get("architectures") or classes[:1]
    said = said if isinstance(said, list | tuple) else (said,)
    chosen = next((name for name in classes if name in said), None)
    if not isinstance(kind, str) or chosen is None:
        what = ", ".join(map(str, said)) or repr(kind)
        own_code = "; code that it brings is never run" if "auto_map" in config else ""
        raise ModelFileError(
            f"{folder / CONFIG} describes {what}, which is no image classifier of transformers "
            f"{_library('transformers').__version__}{own_code}"
        )
    return kind, chosen


def _of_timm(config: Mapping[str, Any], weights: dict[str, Tensor], folder: Path) -> _Made:
    arguments = dict(config.get("model_args") or {})
    classes = config.get("num_classes", (config.get("pretrained_cfg") or {}).get("num_classes"))
    _check_depth(arguments, folder)
    name = config["architecture"]
    if classes is not None:
        arguments["num_classes"] = classes
    shapes = {key: value.shape for key, value in weights.items()}
    with counted(weights):
        planned = _planned(name, arguments)
    _check_size(planned, shapes, folder)
    network = _create(name, arguments)
    unused = fit_weights(network, Checkpoint(folder / WEIGHTS, weights, {}))
    check_finite(network)
    first = next(iter(network.state_dict()))
    prefix = next((key.removesuffix(first) for key in weights if key == first or key.endswith(f".{first}")), "")
    names = config.get("label_names")
    labels = {str(name): place for place, name in enumerate(names)} if isinstance(names, list) else {}
    return _Made(network, labels, [], unused, prefix)


def _create(name: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of that name in timm, without weights from anywhere.

    Raises:
        DataError: no such network, or arguments that it does not take.
    """
    timm = _library("timm")
    refused = sorted(NOT_FROM_A_FILE & arguments.keys())
    if refused:
        raise DataError(f"a network of timm is made without {refused[0]}: weights come out of the file alone")
    if not isinstance(name, str) or re.search(r"[:/\\]", name) or not timm.is_model(name):
        raise DataError(f"timm {timm.__version__} has no network {name!r}; timm.list_models() lists them")
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # arguments of a file or of a user, in any combination
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"timm cannot make {name} with {dict(arguments)}: {reason}") from error


def _planned(name: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """The network without weights, where timm can make it so."""
    try:
        with torch.device("meta"):
            return _create(name, arguments)
    except DataError as error:
        # Some networks compute with numbers as they are made, which have no values there.
        if isinstance(error.__cause__, NotImplementedError | RuntimeError):
            return _create(name, arguments)
        raise


def _shapes(name: str, arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in _planned(name, arguments).state_dict().items()}


def _check_size(network: nn.Module, shapes: Mapping[str, torch.Size], where: Path) -> None:
    """Raise ``WeightsError`` where a network is described as far larger than what there is of it."""
    held = {id(value): value.numel() for value in (*network.parameters(), *network.buffers())}
    wanted, found = sum(held.values()), sum(shape.numel() for shape in shapes.values())
    if wanted > 2 * found + SPARE:
        raise WeightsError(f"{where} describes a network of {wanted:,} numbers and holds {found:,}")


def _check_depth(config: Any, folder: Path, within: str = "") -> None:
    """Raise ``ModelFileError`` where a config asks for more layers than anybody's network has."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key not in ("id2label", "label2id"):
                _check_depth(value, folder, str(key))
    elif isinstance(config, list):
        for value in config:
            _check_depth(value, folder, within)
    elif (
        isinstance(config, int | float)
        and config > MOST_LAYERS
        and re.search("layer|depth|block|repeat|stage", within)
        and not re.search("channel|dim|size|width", within)
    ):
        raise ModelFileError(f"{folder / CONFIG}: {within} is {config}; {MOST_LAYERS} is the most")


def _plain_config(config: Mapping[str, Any], top: bool = True) -> dict[str, Any]:
    """What a config says of the network, without what it says of how to run it."""
    return {
        key: _plain_config(value, False)
        if isinstance(value, Mapping) and key not in ("id2label", "label2id")
        else value
        for key, value in config.items()
        if key not in HOW and not key.startswith("_") and not (top and key in ("model_type", "architectures"))
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder.

    Raises:
        ModelFileError: none there, one that is damaged or a pickle, or an index that names a file elsewhere.
    """
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        files = sorted({str(name) for name in _values(names)})
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
        found = msgspec.json.decode(path.read_bytes())
        plain(found)
    except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def _check_kinds(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ``ModelFileError`` where an entry of a config that is looked into is of another kind than it should be."""
    names = config.get("id2label") or {}
    for key in ("id2label", "model_args", "pretrained_cfg"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ModelFileError(f"{folder / CONFIG}: {key} must be an object, not {config[key]!r}")
    if not all(str(key).isdecimal() and len(str(key)) < 10 for key in names):
        raise ModelFileError(
            f"{folder / CONFIG}: id2label must name the class of each number, not of {shown(next(iter(names)))}"
        )


def _preprocessor(folder: Path) -> dict[str, Any] | None:
    path = folder / PREPROCESSOR
    return _read_json(path) if path.is_file() else None


def _timm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description that timm has of its images, in the words of transformers."""
    said = config.get("pretrained_cfg") or config  # older folders say it right there
    shape = said.get("input_size")
    size = {"height": shape[1], "width": shape[2]} if isinstance(shape, list | tuple) and len(shape) == 3 else None
    return {"size": size, "image_mean": said.get("mean"), "image_std": said.get("std"), "do_normalize": True}


def _size(settings: Mapping[str, Any] | None, config: Mapping[str, Any], where: Path) -> tuple[int, int] | None:
    """Height and width that images are brought to; None where nothing is said of it.

    Raises:
        DataError: what is said is not understood.
    """
    cropped = settings is not None and settings.get("crop_size") and settings.get("do_center_crop", True)
    if settings is None or not settings.get("do_resize", True):
        said = settings["crop_size"] if settings is not None and cropped else config.get("image_size")
    else:
        said = settings["crop_size"] if cropped else settings.get("size", config.get("image_size"))
    if said is None:
        return None
    sides = said if isinstance(said, list | tuple) else [said]
    if isinstance(said, Mapping):
        sides = [said["shortest_edge"]] if set(said) == {"shortest_edge"} else [said.get("height"), said.get("width")]
    if len(sides) not in (1, 2) or not all(type(side) is int and 0 < side <= MOST_SIDE for side in sides):
        raise DataError(
            f"the image size in {where} is not understood ({said!r}): give it with --image-size (image_size=)"
        )
    return sides[0], sides[-1]


def _normalisation(settings: Mapping[str, Any] | None, where: Path) -> nn.Module | None:
    """From images in [0, 1] to what the network takes; None where it takes them as they are.

    Raises:
        DataError: nothing is said of it, or what is said is not understood.
    """
    if settings is None:
        raise DataError(
            f"{where} has no {PREPROCESSOR}, so that it is not known what the network does to images: say it with --mean and "
            "--std (preprocess=)"
        )
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    mean, std = settings.get("image_mean"), settings.get("image_std")
    usual = mean is not None and "MobileViT" not in kind  # which writes a mean and does not use it
    normalised = settings.get("do_normalize", usual)
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    try:
        scale = 255 * float(factor)
        center, width = (_numbers(mean), _numbers(std)) if normalised else ([0.0] * 3, [1.0] * 3)
        if not all(map(math.isfinite, (scale, *center, *width))):
            raise ValueError("numbers that are not finite")
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"the normalisation in {where} is not understood (rescale_factor {factor!r}, image_mean {mean!r}, image_std "
            f"{std!r}): give it with --mean and --std (preprocess=)"
        ) from error
    if settings.get("do_color_quantize") or scale <= 0:
        raise DataError(f"{where} turns images into something else than scaled ones; say what with preprocess=")
    offset = 1.0 if settings.get("rescale_offset") and settings.get("do_rescale", True) else 0.0
    center, width = [(offset + value) / scale for value in center], [value / scale for value in width]
    if normalised and settings.get("include_top", "EfficientNet" in kind):  # EfficientNet divides a second time
        width = [value * twice for value, twice in zip(width, _numbers(std), strict=True)]
    steps: list[nn.Module] = []
    if any(abs(value) > 1e-6 for value in center) or any(abs(value - 1) > 1e-6 for value in width):
        steps.append(Normalise(center, width))
    if settings.get("do_flip_channel_order", "MobileViT" in kind):
        steps.append(FlipChannels())
    return nn.Sequential(*steps) if len(steps) > 1 else next(iter(steps), None)


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3)]


def _in_words(preprocess: nn.Module | None, size: tuple[int, int] | None) -> str:
    """What is done to images because a file says so."""
    said = [] if size is None else [f"resized to {size[0]}x{size[1]} where they come from files"]
    for step in [] if preprocess is None else preprocess.modules():
        if isinstance(step, Normalise):
            state = {key: ",".join(f"{value:.4g}" for value in values) for key, values in step.state().items()}
            said.append(f"normalised with mean {state['mean']} and std {state['std']}")
        elif isinstance(step, FlipChannels):
            said.append("turned from RGB to BGR")
    return ", ".join(said) or "taken as they are"


def _relabelled(source: Source, images: LabelledImages, labels: Mapping[str, int]) -> LabelledImages:
    """Images with the network's labels, where they are of a folder whose subfolders have the names of the network's classes."""
    folder = Path(source).expanduser() if isinstance(source, str | Path) else None
    places = {_alike(name): place for name, place in labels.items()}
    if folder is None or not folder.is_dir() or not is_image_folder(folder) or len(places) < len(labels):
        return images
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not all(_alike(name) in places for name in names):
        return images
    numbered = all(
        name.isascii() and name.isdigit() and len(name) < 10 for name in names
    )  # then labels, as they were read
    read = {int(name) if numbered else place: places[_alike(name)] for place, name in enumerate(names)}
    return LabelledImages(images.images, torch.tensor([read[label] for label in images.labels.tolist()]))


def _alike(name: str) -> str:
    return re.sub(r"[\s_]", "", name).lower()


def _values(container: Any) -> Iterator[Any]:
    """What nested containers of JSON hold, without their keys."""
    if isinstance(container, Mapping | list):
        for value in container.values() if isinstance(container, Mapping) else container:
            yield from _values(value)
    elif container is not None:
        yield container


def _fetch(name: str) -> Path:
    """The folder that a repository of the Hub is kept in, of which only JSON and safetensors are fetched.

    Raises:
        ModelFileError: no such repository, or the Hub cannot be reached and it was not fetched before.
    """
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if found is None:
        raise ModelFileError(f"a repository of the Hub is named hf:owner/name or hf:owner/name@revision, not {name}")
    hub = _library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(found[1], revision=found[2], allow_patterns=list(FETCHED)))
    except Exception as error:  # of the network, of the Hub, of the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(
            f"{name} cannot be fetched from the Hub and was not fetched before ({reason}); a local folder needs no Hub"
        ) from error


def _library(name: str) -> Any:
    """A library of an extra, imported when it is needed.

    Raises:
        DataError: not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "timm" if name == "timm" else "transformers"
        raise DataError(f"this needs {name} ({error}): pip install 'backdoor-gym[{extra}]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, transformers says nothing of its own."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
