"""What a file of a policy or of its training says, checked before it is used; a file may come from anybody."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import UNSET, Meta, UnsetType
from torch import Tensor, nn

from backdoor_gym.errors import ModelFileError, WeightsError
from backdoor_gym.files.schemas import Count, Fields, Threshold, checked
from backdoor_gym.files.sizes import within
from backdoor_gym.networks.weights import check_shapes

from .encoder import EncoderOptions, GraphActorCritic, encoder_facts
from .look_ahead import LookAhead

FORMAT = "onp-policy"
CHECKPOINT = "onp-checkpoint"
#: What Adam remembers of a parameter.
ADAM = ("step", "exp_avg", "exp_avg_sq")
Names = Annotated[list[str], Meta(max_length=1000)]


class EncoderFields(Fields):
    """The options of the network, and the features that it was made for."""

    options: dict[str, Any]
    node_features: Names
    global_features: Names
    edge_features: Names


class PolicyFields(Fields):
    """A policy, or a checkpoint of its training, beside the tensors."""

    format: str
    encoder: EncoderFields
    look_ahead: dict[str, Any] | None
    threshold: Threshold
    facts: dict[str, Any]
    timesteps: Count = 0
    progress: dict[str, Any] | UnsetType = UNSET


class KnownFacts(Fields, forbid_unknown_fields=False):
    """Facts that are used again; others are for people."""

    timesteps: Count = 0
    validation: dict[str, float] | None = None


@dataclass(frozen=True)
class SavedPolicy:
    """What was read: the shape of the network, the look-ahead, and the other fields."""

    encoder: EncoderOptions
    look_ahead: LookAhead | None
    fields: PolicyFields


def read_policy(metadata: Mapping[str, Any], kind: str, path: Any) -> SavedPolicy:
    """The metadata of the file ``path``, whose format must be ``kind``.

    Raises:
        ModelFileError: another format, a field of another type or out of its range, or a policy for other features.
    """
    if metadata.get("format") != kind:
        raise ModelFileError(f"{path} is no file of the kind {kind}, but {metadata.get('format', 'an infected model')}")
    fields = checked(metadata, PolicyFields, str(path))
    checked(fields.facts, KnownFacts, str(path))
    options = checked(fields.encoder.options, EncoderOptions, str(path))
    made_for = {**msgspec.structs.asdict(fields.encoder), "options": None}
    if made_for != {**encoder_facts(options), "options": None}:
        raise ModelFileError(f"{path} was made for other features than those of this version of backdoor-gym")
    look_ahead = None if fields.look_ahead is None else checked(fields.look_ahead, LookAhead, str(path))
    return SavedPolicy(options, look_ahead, fields)


def check_weights(options: EncoderOptions, tensors: Mapping[str, Tensor], path: Any) -> None:
    """Raise ``ModelFileError`` unless a file holds finite weights of its network; nothing is allocated before."""
    try:
        network = within(lambda: GraphActorCritic(options), tensors)
        check_shapes(network, tensors)
    except (WeightsError, RuntimeError, TypeError, OverflowError) as error:  # of PyTorch where sizes overflow
        raise ModelFileError(f"{path} does not hold the weights of its network: {error}") from error
    for key, value in network.state_dict().items():
        _check_numbers(tensors[key], value, key, path)


def optimizer_state(
    tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], path: Path
) -> dict[int, dict[str, Tensor]]:
    """The state of Adam by the number of the parameter: its steps and both moments.

    Raises:
        ModelFileError: it is not of these parameters.
    """
    known = {f"optimizer.{index}.{key}" for index in range(len(parameters)) for key in ADAM}
    strange = sorted(key for key in tensors if not key.startswith("network.") and key not in known)
    if strange:
        raise ModelFileError(f"{path} is damaged: it holds {strange[0]}, which no checkpoint has; remove it")
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        entry = {key: tensors.get(f"optimizer.{index}.{key}") for key in ADAM}
        given = {key: value for key, value in entry.items() if value is not None}
        if not given:  # no step was made
            continue
        if len(given) < len(entry) or given["step"].numel() != 1:
            raise ModelFileError(f"{path} is damaged: the state of its optimizer is not complete; remove it")
        for key, value in given.items():
            _check_numbers(value, value if key == "step" else parameter, f"optimizer.{index}.{key}", path)
        state[index] = given
    return state


def _check_numbers(tensor: Tensor, like: Tensor, name: str, path: Any) -> None:
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise ModelFileError(
            f"{path} is damaged: {name} is {tensor.dtype} {tuple(tensor.shape)} instead of {like.dtype} {tuple(like.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise ModelFileError(f"{path} holds values that are not finite (first in {name})")
