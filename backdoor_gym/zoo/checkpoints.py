"""Other people's checkpoints: weights out of safetensors and torch files, without running anything that came with them.

torch files are read by torch's restricted reader (``weights_only=True``). What it does not know (numpy numbers, an
``argparse.Namespace``, a pickled class, ...) is replaced by inert stand-ins of this module, and named in the result: neither
imported nor called.
"""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..arguments import check_path
from ..errors import ModelFileError, WeightsError
from ..wording import cut, printable
from .files import MOST_NAME, UNREADABLE, check_names, is_pickle, read_safetensors
from .pickles import check_torch_file, is_zip
from .plain import odd_kind

#: Keys under which training code keeps the weights, the likelier first (``netC`` is the classifier beside a generator).
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "netC", "network", "weights", "params")
#: What a checkpoint may say about itself beside the weights, as BackdoorBench's do, and the type each must have.
FACTS = {"model_name": str, "num_classes": int, "clean_data": str, "img_size": list | tuple}
COUNTER = "num_batches_tracked"
#: Parts of names under which wrappers and training code hold a network as a whole; what stands beside one of these is not its.
HOLDERS = frozenset({*WRAPPERS, "module", "_orig_mod", "classifier", "student", "online"})
#: Names of what trains or judges a network, or of averages of it.
BESIDE = re.compile(
    r"(^|[._])(criterion|loss\w*|losses|metrics?|acc|accuracy|ema\d*|swa|averaged?|n_averaged|shadow|teacher|momentum|optim\w*|"
    r"scheduler|class_weights?|pos_weight|global_step|epochs?|steps?|num_updates|num_batches|best)([._]|$)"
)
#: Names of what makes the images that a network takes: without it, it would be given others.
NORMALISING = re.compile(r"mean|std|normali|preprocess|transform", re.IGNORECASE)
#: What an archive begins with. A zip may be a torch file, which holds a pickle of this name.
ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x28\xb5\x2f\xfd")
TORCH_PICKLE = "data.pkl"
#: Modules of a pickled network that are looked into, what stands in all of them, and networks in a file.
MOST_MODULES, MOST_PARTS, MOST_NETWORKS = 20_000, 100_000, 64
#: Dicts in dicts that weights are looked for in.
MOST_DEPTH = 10


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a file.

    Attributes:
        path: the file.
        weights: the state dict, with the file's own names.
        facts: those of ``FACTS`` that the file holds.
        unread: names of classes and functions in the file that were not touched.
    """

    path: Path
    weights: dict[str, Tensor]
    facts: dict[str, Any]
    unread: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The weights of a ``.safetensors`` or a torch file (``.pt``, ``.pth``, ``.tar``, ...); what it is, its first bytes tell.

    A torch file holds a state dict, a dict that holds one (under a key of ``WRAPPERS``, or the only one there), or a whole
    pickled network, of which only the tensors are taken.

    Raises:
        ModelFileError: missing, damaged, of another kind, without weights or with several sets of them, or one that would call
            into the operating system when read.
    """
    check_path("the path of a checkpoint", path)
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise ModelFileError(f"there is no file {path}")
    refuse_archive(path)
    if not is_pickle(path):
        weights, _ = read_safetensors(path)
        if not weights:
            raise ModelFileError(f"{path} holds no tensor")
        return Checkpoint(path, weights, {})
    content, unread = _read_torch(path)
    facts = {}
    if isinstance(content, Mapping):
        said = {key: content.get(key) for key in FACTS}
        facts = {
            key: value
            for key, value in said.items()
            if isinstance(value, FACTS[key]) and (isinstance(value, int) or len(value) <= MOST_NAME)
        }
    try:
        weights = _find_weights(path, content)
    except ModelFileError:
        raise
    except (
        RecursionError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:  # a file that holds itself, or parts of no such kind
        raise ModelFileError(f"{path} is damaged: what it holds is not put together as weights are") from error
    check_names(path, weights)
    for name, tensor in weights.items():
        odd = odd_kind(tensor)
        if odd == "quantised":
            raise _quantised(path, name)
        if odd:
            raise ModelFileError(
                f"{path} holds a tensor that is no plain array of numbers ({name} is {odd}): save the dense one in its place"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelFileError(f"{path} is damaged: {name} is larger than what is stored of it")
    return Checkpoint(path, weights, facts, unread)


def is_archive(path: Path) -> bool:
    """Whether a file begins like an archive (zip, tar, gz, 7z, ...) and is no torch file."""
    with path.open("rb") as file:
        start = file.read(262)
    if start.startswith(ARCHIVES) or start[257:] == b"ustar":
        return True
    if not start.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return not any(name.count("/") <= 1 and name.rpartition("/")[2] == TORCH_PICKLE for name in names)


def refuse_archive(path: Path) -> None:
    """Weights are not looked for in an archive.

    Raises:
        ModelFileError: the file is one.
    """
    if is_archive(path):
        raise ModelFileError(
            f"{path} is an archive around other files: unpack it first, and name the file with the weights (BackdoorBench's is "
            "attack_result.pt)"
        )


def fit_weights(network: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Load the weights into a network, whatever prefix (``module.``, ``model.``, ``_orig_mod.``, ...) their names have.

    Counters of batches that old files lack (``num_batches_tracked``) are left as they are. What training code keeps beside
    the network (a criterion's weights, metrics, counters, averages of the network) is left out, and its names are returned.

    Raises:
        WeightsError: names missing or unexpected, other shapes, integers for floats, or several networks that fit.
    """
    wanted, weights = network.state_dict(), checkpoint.weights
    prefix, copies = _find_prefix(wanted, checkpoint)
    found = {key: prefix + key for key in wanted if prefix + key in weights}
    missing = [key for key in wanted if key not in found and not key.endswith(COUNTER)]
    taken = set(found.values())
    more = [key for key in weights if key not in taken]
    own = {key.partition(".")[0] for key in wanted}
    beside = [key for key in more if key.startswith(copies) or _is_beside(key, weights[key], prefix, own)]
    left_out = set(beside)
    unexpected = [key for key in more if key not in left_out]
    differing = [
        f"{key} {tuple(weights[name].shape)} instead of {tuple(wanted[key].shape)}"
        for key, name in found.items()
        if weights[name].shape != wanted[key].shape
    ]
    whole = [
        f"{name} {str(weights[name].dtype).removeprefix('torch.')}"
        for key, name in found.items()
        if wanted[key].is_floating_point() and not weights[name].is_floating_point()
    ]
    broken = [
        name
        for key, name in found.items()
        if not wanted[key].is_floating_point()
        and weights[name].shape == wanted[key].shape
        and not _is_whole(weights[name])
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", differing),
            ("quantised or of integers or complex numbers where floats are needed", whole),
            ("of no whole numbers where those are needed", broken),
        )
        if keys
    ]
    if problems:
        stripped = f' (the prefix "{prefix}" was taken off)' if prefix else ""
        raise WeightsError(
            f"the weights in {checkpoint.path} are not those of this {type(network).__name__}: {'; '.join(problems)}{stripped}"
        )
    with torch.no_grad():
        for key, name in found.items():
            try:
                wanted[key].copy_(weights[name])
            except (RuntimeError, TypeError) as error:  # kinds of numbers that torch knows and does not convert
                raise WeightsError(f"{name} in {checkpoint.path} cannot be read as numbers ({error})") from error
    return beside


def _is_whole(tensor: Tensor) -> bool:
    """Whether all are whole numbers, whatever their type."""
    if tensor.is_complex():
        return False
    return not tensor.is_floating_point() or bool((tensor.double() == tensor.double().round()).all())


def beginnings(names: Iterable[str]) -> list[str]:
    """Names up to their first part that is none of ``HOLDERS``, each once: an average has as many as the network."""
    found = []
    for name in names:
        parts = name.split(".")
        held = next((place for place, part in enumerate(parts) if part not in HOLDERS), len(parts))
        found.append(".".join(parts[: held + 1]))
    return list(dict.fromkeys(found))


def _find_prefix(wanted: Mapping[str, Tensor], checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    """The prefix under which the file has the network, and those under which it has copies of it (averages, a teacher).

    Raises:
        WeightsError: several that nothing tells apart.
    """
    weights = checkpoint.weights
    needed = {key for key in wanted if not key.endswith(COUNTER)}
    fitting = Counter({"": 0})
    for name in weights:
        fitting.update(prefix for prefix in _prefixes(name) if name[len(prefix) :] in needed)
    most = max(fitting.values())
    best = sorted((prefix for prefix in fitting if fitting[prefix] == most), key=lambda prefix: (len(prefix), prefix))
    if most < len(needed) or len(best) == 1:
        return best[0], ()
    known = [prefix for prefix in best if set(prefix.split(".")[:-1]) <= HOLDERS]
    if len(known) != 1:
        names = ", ".join(prefix or "no prefix" for prefix in best)
        raise WeightsError(
            f"{checkpoint.path} holds the weights of several networks that fit ({names}); save the one you mean alone"
        )
    return known[0], tuple(prefix for prefix in best if prefix != known[0])


def _is_beside(name: str, tensor: Tensor, prefix: str, own: Set[str]) -> bool:
    """Whether a tensor of a file is of no layer, but of what trains or judges the network, whose names begin with ``own``."""
    if prefix:
        if name.startswith(prefix):
            return False
    elif name.partition(".")[0] in own:
        return False
    if BESIDE.search(name):
        return True
    if NORMALISING.search(name):
        return False
    held = bool(prefix) and set(prefix.split(".")[:-1]) <= HOLDERS
    counter = not tensor.is_floating_point() or (tensor.ndim == 0 and "." not in name)
    return counter or (held and tensor.ndim < 2)


def _prefixes(name: str) -> Iterator[str]:
    """Beginnings of a name that end in a dot, of four parts at most, and the empty one."""
    yield ""
    parts = name.split(".")[:-1]
    for count in range(1, min(len(parts), 4) + 1):
        yield ".".join(parts[:count]) + "."


class _StandIn:
    """Takes the place of whatever the restricted reader does not know; keeps what it was given and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.kept: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.kept = state


def _read_torch(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What a torch file holds, with stand-ins, and the names of what they stand for."""
    if is_zip(path) and _is_torchscript(path):
        raise ModelFileError(
            f"{path} is TorchScript, which does not show its layers: give the state dict of the Python module that it was made from"
        )
    check_torch_file(path)
    try:
        with path.open("rb") as file:  # of a path, torch would look at the name and not at what it is
            unknown = sorted(get_unsafe_globals_in_checkpoint(file)) if is_zip(path) else []
            file.seek(0)
            with safe_globals([(_StandIn, name) for name in unknown]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        return content, tuple(printable(cut(name, MOST_NAME)) for name in unknown)
    except UNREADABLE as error:
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = f"it names {called[1]}" if called else lines[0]
        raise ModelFileError(
            f"{path} is damaged, or cannot be read without running what it holds, and is not opened ({reason}); where it can "
            "do no harm, load it and save its state_dict() alone, best with safetensors.torch.save_file"
        ) from error


def _is_torchscript(path: Path) -> bool:
    """Whether a zip of torch holds programs."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def _quantised(path: Path, name: str) -> ModelFileError:
    return ModelFileError(
        f"{path} holds the weights of a quantised network ({name}), which cannot be pruned; give the state dict of the network of "
        "floats that it was made of"
    )


def _find_weights(path: Path, content: Any, depth: int = 0) -> dict[str, Tensor]:
    if depth > MOST_DEPTH:
        raise ValueError(f"more than {MOST_DEPTH} dicts in dicts")
    if _is_state_dict(content):
        return dict(content)
    own = _own_tensors(path, content)
    if isinstance(content, _StandIn):
        weights = _of_module(content)
        if weights:
            return weights
    if isinstance(content, Mapping):
        kinds: dict[int, bool] = {}  # one dict may be there under many keys
        for value in content.values():
            if id(value) not in kinds:
                kinds[id(value)] = _is_state_dict(value)
        inside = {key: value for key, value in content.items() if kinds[id(value)]}
        networks = {key: value for key, value in content.items() if isinstance(value, _StandIn)}
        if len(networks) > MOST_NETWORKS:
            networks = {key: value for key, value in networks.items() if key in WRAPPERS}
        pickled = {key: _of_module(value) for key, value in networks.items()}
        inside |= {key: weights for key, weights in pickled.items() if weights}
        if len(own) > max(map(len, inside.values()), default=0):
            return own
        for key in WRAPPERS:
            if key in inside:
                return dict(inside[key])
            if _own_tensors(path, content.get(key)):
                return _find_weights(path, content[key], depth + 1)
        if own and len(own) == max(map(len, inside.values())):
            return own
        if len(inside) == 1:
            return dict(next(iter(inside.values())))
        if inside:
            raise ModelFileError(
                f"{path} holds several sets of weights ({', '.join(map(str, inside))}); save the one you mean alone, or under "
                f"the key {WRAPPERS[0]}"
            )
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _find_weights(path, content[key], depth + 1)
    keys = f", only {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) and content else ""
    raise ModelFileError(f"{path} holds no state dict (names and tensors){keys}")


def _own_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The weights right in a dict, between numbers, texts and other dicts; none where there are but counters.

    Raises:
        ModelFileError: they are of a quantised network.
    """
    if not isinstance(content, Mapping):
        return {}
    for key in content:
        if isinstance(key, str) and "_packed_params" in key:
            raise _quantised(path, key)
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return own if any(tensor.ndim for tensor in own.values()) else {}


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _of_module(network: Any) -> dict[str, Tensor]:
    """Names and tensors of a pickled ``nn.Module`` that a stand-in has taken the place of.

    Raises:
        ValueError: more modules than ``MOST_MODULES``, or more in them than ``MOST_PARTS``: some that share others, or hold
            themselves, may spell out any number.
    """
    found: dict[str, Tensor] = {}
    front, visited, parts = [("", network)], 0, 0
    while front:
        prefix, module = front.pop()
        state = module.kept if isinstance(module, _StandIn) else None
        if not isinstance(state, Mapping):
            continue
        visited += 1
        if visited > MOST_MODULES:
            raise ValueError(f"more than {MOST_MODULES} modules")
        parts += sum(len(state.get(part) or ()) for part in ("_parameters", "_buffers", "_modules"))
        if parts > MOST_PARTS or len(prefix) > MOST_NAME:
            raise ValueError(f"more than {MOST_PARTS} parts, or a name of more than {MOST_NAME} characters")
        passing = state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers"):
            for name, tensor in (state.get(part) or {}).items():
                if isinstance(tensor, Tensor) and name not in passing:
                    found[prefix + name] = tensor.detach()
        front.extend((f"{prefix}{name}.", child) for name, child in (state.get("_modules") or {}).items())
    return found
