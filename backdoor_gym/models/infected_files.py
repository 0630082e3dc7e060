"""The file of an infected model: its weights, where its images are from, its trigger, and what is known of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor

from ..attacks import Attack, get_attack
from ..data.datasets import DataSource, LabelledImages, fingerprint, named_in_file, split_size
from ..data.pictures import MOST_SIDE
from ..errors import BackdoorGymError, DataError, ModelFileError
from ..files.schemas import MOST_NAME, ImagesFields, ModelFields, checked, free
from ..files.sizes import check_pass, within
from ..files.tensors import read_tensors, write_tensors
from ..networks import build_from_spec
from ..networks.preprocessing import Normalise, Preprocessed
from ..networks.weights import check_shapes, load_weights
from ..wording import first_line, one_line
from ..writing import as_json

if TYPE_CHECKING:
    from .infected import InfectedModel

FORMAT = "backdoor-gym-infected/1"
Model = TypeVar("Model")
#: Bytes that the images of a file may take in memory, as float32.
MOST_HELD = 1 << 30
#: Tensors of a file beside those of the network and of the trigger.
IMAGES = frozenset(f"{role}.{what}" for role in ("clean", "test") for what in ("images", "labels", "indices"))


def write_infected(path: Path, model: "InfectedModel", half: bool) -> None:
    """Write the file of a model (see ``InfectedModel.save``)."""
    write_tensors(path, *packed(model, half))


def packed(model: "InfectedModel", half: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of the file of a model.

    Raises:
        ModelFileError: nobody could load it.
    """
    if model.architecture is None:
        raise ModelFileError(
            "only a model whose architecture is known by name can be saved as an infected model; "
            "set .architecture, or save the state dict alone with safetensors"
        )
    weights = model.module.state_dict()
    if half:
        weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    tensors = {f"network.{key}": value for key, value in weights.items()}
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "name": one_line(model.name, MOST_NAME - 3),
        "architecture": model.architecture,
        "target": model.target,
        "facts": free(model.facts, "the model"),
        "data": {},
    }
    if isinstance(model.network, Preprocessed):
        in_front = model.network.preprocess.function
        if not isinstance(in_front, Normalise):
            raise ModelFileError("a preprocess other than Normalise(mean, std) cannot be saved with the model")
        metadata["normalise"] = in_front.state()
    for role, images in (("clean", model.clean), ("test", model.test)):
        if images is not None:
            metadata["data"][role] = _pack_images(images, role, tensors)
    if model.trigger is not None:
        if not isinstance(model.trigger, Attack):
            raise ModelFileError(
                "a trigger of your own cannot be saved with the model; only attacks of this package can"
            )
        parameters, trigger_tensors = model.trigger.state()
        metadata["trigger"] = {"attack": model.trigger.name, "parameters": parameters}
        tensors |= {f"trigger.{key}": value for key, value in trigger_tensors.items()}
    try:
        described = msgspec.json.decode(as_json(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"the model cannot be described in a file, as JSON: {first_line(error)}") from error
    checked(described, ModelFields, "the model")  # it is to be read again
    _check_images({key: value.shape for key, value in tensors.items()})
    return tensors, metadata


def read_infected(path: Path, data: str | None, make: Callable[..., Model]) -> Model:
    """What ``make`` makes of the arguments of ``InfectedModel`` that a file holds (see ``InfectedModel.load``)."""
    tensors, metadata = read_tensors(path, _check_images)
    if metadata.get("format") != FORMAT:
        raise ModelFileError(f"{path} holds {metadata.get('format')!r}, not an infected model ({FORMAT})")
    fields = checked(metadata, ModelFields, str(path))
    try:
        strange = [name for name in tensors if not name.startswith(("network.", "trigger.")) and name not in IMAGES]
        if strange:
            raise ModelFileError(f"{path} holds {strange[0]}, which no infected model has")
        weights = _part(tensors, "network.")
        # A file says how large the network is: nothing is allocated before its weights fit.
        planned = within(lambda: build_from_spec(fields.architecture), weights)
        check_shapes(planned, weights)
        network = build_from_spec(fields.architecture)
        load_weights(network, weights)
        if fields.normalise is not UNSET:
            network = Preprocessed(Normalise(fields.normalise.mean, fields.normalise.std), network)
        clean, test, trigger = _unpack_images(fields.data.clean, "clean", tensors, data), None, None
        check_pass(planned, clean.images.shape[1:])
        if fields.data.test is not UNSET:
            test = _unpack_images(fields.data.test, "test", tensors, data)
        if fields.trigger is not UNSET:
            attack = get_attack(fields.trigger.attack)
            trigger = attack.from_state(fields.trigger.parameters, _part(tensors, "trigger."))
        name = fields.name.strip() or "unnamed"
        facts = free(metadata["facts"], str(path))
        return make(network, clean, test, trigger, fields.target, fields.architecture, facts, name)
    except BackdoorGymError:
        raise
    except Exception as error:  # whatever a file says, reading it must end in one clear line
        raise ModelFileError(
            f"{path} does not describe an infected model completely ({type(error).__name__}: {first_line(error)})"
        ) from error


def _check_images(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ``ModelFileError`` where a file holds images that are too large, or too many."""
    held = [tuple(shapes[f"{role}.images"]) for role in ("clean", "test") if f"{role}.images" in shapes]
    taken = 4 * sum(map(math.prod, held))
    if taken > MOST_HELD:
        raise ModelFileError(
            f"the images that a model's file holds may take {MOST_HELD >> 20:,} MiB, not {taken >> 20:,} ({held}): hold fewer test "
            "images in it, or name a data set"
        )
    if any(max(shape[2:], default=0) > MOST_SIDE for shape in held):
        raise ModelFileError(f"the images that a model's file holds have at most {MOST_SIDE} pixels a side, not {held}")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _pack_images(images: LabelledImages, role: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Images of a named data set as its name and their indices, others as they are."""
    if images.source is None:
        tensors[f"{role}.images"], tensors[f"{role}.labels"] = images.images, images.labels
        return {}
    source = images.source
    tensors[f"{role}.indices"] = torch.tensor(source.indices, dtype=torch.int64)
    digest = source.fingerprint or fingerprint(source.dataset, source.split)
    return {"dataset": source.dataset, "split": source.split, "fingerprint": digest}


def _unpack_images(fields: ImagesFields, role: str, tensors: Mapping[str, Tensor], data: str | None) -> LabelledImages:
    if fields.dataset is UNSET or fields.split is UNSET:
        if data is not None:
            raise DataError(
                f"the model holds its {role} images itself, and names no data set that another could stand for: leave --data "
                "(data=) out"
            )
        return LabelledImages(tensors[f"{role}.images"], tensors[f"{role}.labels"])
    dataset, split = data or named_in_file(fields.dataset), fields.split
    digest = fingerprint(dataset, split)
    if digest != fields.fingerprint:
        raise DataError(
            f"the split {split} of {dataset} is not the one that the model names (other labels or another order); "
            "its clean images might be training images"
        )
    indices = tensors[f"{role}.indices"]
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ModelFileError(f"{role}.indices must be int64 (n,), not {indices.dtype} {tuple(indices.shape)}")
    if len(indices) > split_size(dataset, split) or len(torch.unique(indices)) < len(indices):
        raise ModelFileError(f"{role}.indices name some images several times")
    return LabelledImages.from_source(DataSource(dataset, split, tuple(indices.tolist()), digest))
