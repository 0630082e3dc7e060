"""Image classifiers of transformers, of a folder that describes one. Code that the folder names is never imported."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BackdoorGymError, ModelFileError, WeightsError
from ..files.fitting import COUNTER
from ..files.sizes import within
from ..networks.weights import check_finite, differences
from ..wording import cut, first_line
from .described import CONFIG, NOT_FROM_A_FILE, Made, check_asked, check_size, library
from .layout import WEIGHTS, quiet_transformers

#: Entries of a config that say how a network is run, not what it is; some of them would have code fetched.
HOW = {
    "attn_implementation", "auto_map", "dtype", "experts_implementation", "output_attentions", "output_hidden_states",
    "return_dict", "torch_dtype", "torchscript", "transformers_weights", "use_return_dict",
}  # fmt: skip


def make_transformers(config: Mapping[str, Any], weights: dict[str, Tensor], folder: Path) -> Made:
    """The network of a folder whose ``config.json`` names a class of transformers.

    Raises:
        ModelFileError: it is no image classifier, or cannot be built.
        WeightsError: the weights are not those of the network.
    """
    transformers = library("transformers")
    kind, chosen = _classifier(config, folder)
    if config.get("quantization_config"):
        raise ModelFileError(f"{folder} holds quantised weights; a network is repaired as the floats it was made of")
    check_asked(config, folder)
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
        with quiet_transformers():
            described = transformers.AutoConfig.for_model(kind, **_plain(config))
            described.architectures = [chosen]
            getattr(transformers, chosen)  # imported here, which is no work of the network's
            automatic = transformers.AutoModelForImageClassification
            # A file says how large the network is: nothing is allocated before that is known.
            planned = within(lambda: automatic.from_config(described, trust_remote_code=False), weights)
            check_size(planned, weights, folder)
            network, info = type(planned).from_pretrained(
                None, config=described, state_dict=floats, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except BackdoorGymError:
        raise
    except Exception as error:  # whatever a file says, reading it must end in one clear line
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelFileError(f"{folder / CONFIG} does not describe a {chosen} that can be built ({reason})") from error
    differing = [  # releases before 5 tell the names alone
        told if isinstance(told, str) else f"{told[0]} {tuple(told[1])} instead of {tuple(told[2])}"
        for told in sorted(info["mismatched_keys"])
    ]
    problems = differences(
        sorted(key for key in info["missing_keys"] if not key.endswith(COUNTER)), [], sorted(differing)
    )
    if problems:
        raise WeightsError(f"the weights in {folder} are not those of the {chosen} that it describes: {problems}")
    check_finite(network)
    labels = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    unread = sorted({str(name) for name in values_in(config.get("auto_map", {}))})
    return Made(network.float(), labels, unread, sorted(info["unexpected_keys"]), planned)


def _classifier(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """The type of network that a config names, and its class of transformers, which must be an image classifier."""
    known = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = config.get("model_type")
    classes = known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind, ()) if isinstance(kind, str) else ()
    classes = (classes,) if isinstance(classes, str) else tuple(classes)
    named = config.get("architectures") or classes[:1]
    named = named if isinstance(named, list | tuple) else (named,)
    chosen = next((name for name in classes if name in named), None)
    if not isinstance(kind, str) or chosen is None:
        what = cut(", ".join(map(str, named)) or repr(kind))
        own_code = "; code that it brings is never run" if "auto_map" in config else ""
        raise ModelFileError(
            f"{folder / CONFIG} describes {what}, which is no image classifier of transformers "
            f"{library('transformers').__version__}{own_code}"
        )
    return kind, chosen


def _plain(config: Mapping[str, Any], top: bool = True) -> dict[str, Any]:
    """What a config says of the network, without what it says of how to run it."""
    return {
        key: _plain(value, False) if isinstance(value, Mapping) and key not in ("id2label", "label2id") else value
        for key, value in config.items()
        if key not in HOW and not key.startswith("_") and not (top and key in ("model_type", "architectures"))
    }


def values_in(container: Any) -> Iterator[Any]:
    """What nested containers of JSON hold, without their keys."""
    if isinstance(container, Mapping | list):
        for value in container.values() if isinstance(container, Mapping) else container:
            yield from values_in(value)
    elif container is not None:
        yield container
