"""Weights of a checkpoint loaded into a network, whatever their names begin with and whatever stands beside them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from .checkpoints import WRAPPERS, Checkpoint

COUNTER = "num_batches_tracked"
#: Parts of names under which wrappers and training code hold a whole network; what stands beside such a part is none of its layers.
HOLDERS = frozenset({*WRAPPERS, "module", "_orig_mod", "classifier", "student", "online"})
#: Parts of a prefix at most.
MOST_HELD = 4
#: Names of what trains or judges a network, or of averages of it.
BESIDE = re.compile(
    r"(^|[._])(criterion|loss\w*|losses|metrics?|acc|accuracy|ema\d*|swa|averaged?|n_averaged|shadow|teacher|momentum|optim\w*|"
    r"scheduler|class_weights?|pos_weight|global_step|epochs?|steps?|num_updates|num_batches|best)([._]|$)"
)
#: Names of what makes the images that a network takes: without it, it would be given others.
NORMALISING = re.compile(r"mean|std|normali|preprocess|transform", re.IGNORECASE)


def fit_weights(network: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Load the weights into a network, whatever prefix (``module.``, ``model.``, ``_orig_mod.``, ...) their names have.

    Counters of batches that old files lack (``num_batches_tracked``) stay as they are.

    Returns:
        The names of what is left out, as it belongs to training: a criterion's weights, metrics, counters, averages.

    Raises:
        WeightsError: names missing or unexpected, other shapes, integers for floats, or several networks that fit.
    """
    needed, weights = network.state_dict(), checkpoint.weights
    prefix, copies = _find_prefix(needed, checkpoint)
    names = {key: prefix + key for key in needed if prefix + key in weights}
    taken, own = set(names.values()), {key.partition(".")[0] for key in needed}
    problems: dict[str, list[str]] = {
        "missing": [key for key in needed if key not in names and not key.endswith(COUNTER)],
        "unexpected": [],
        "of another shape": [],
        "quantised or of integers or complex numbers where floats are needed": [],
        "of no whole numbers where those are needed": [],
    }
    _, unexpected, reshaped, not_floats, not_whole = problems.values()
    beside: list[str] = []
    for name in weights:
        if name not in taken:
            left_out = any(start in copies for start in _prefixes(name)) or _is_beside(name, weights[name], prefix, own)
            (beside if left_out else unexpected).append(name)
    for key, name in names.items():
        tensor, place = weights[name], needed[key]
        if tensor.shape != place.shape:
            reshaped.append(f"{key} {tuple(tensor.shape)} instead of {tuple(place.shape)}")
        if place.is_floating_point() and not tensor.is_floating_point():
            not_floats.append(f"{name} {str(tensor.dtype).removeprefix('torch.')}")
        if not place.is_floating_point() and tensor.shape == place.shape and not _is_whole(tensor):
            not_whole.append(name)
    listed = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if listed:
        stripped = f' (the prefix "{prefix}" was taken off)' if prefix else ""
        raise WeightsError(
            f"the weights in {checkpoint.path} are not those of this {type(network).__name__}: {'; '.join(listed)}{stripped}"
        )
    with torch.no_grad():
        for key, name in names.items():
            try:
                needed[key].copy_(weights[name])
            except (RuntimeError, TypeError) as error:  # kinds of numbers that torch knows and does not convert
                raise WeightsError(f"{name} in {checkpoint.path} cannot be read as numbers ({error})") from error
    return beside


def beginnings(names: Iterable[str]) -> list[str]:
    """Names up to their first part that is none of ``HOLDERS``, each once: an average has as many names as the network."""
    short: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        held = next((place for place, part in enumerate(parts) if part not in HOLDERS), len(parts))
        short[".".join(parts[: held + 1])] = None
    return list(short)


def _find_prefix(needed: Mapping[str, Tensor], checkpoint: Checkpoint) -> tuple[str, set[str]]:
    """The prefix of the network in the file, and those of copies of it (averages, a teacher).

    Raises:
        WeightsError: several that nothing tells apart.
    """
    keys = {key for key in needed if not key.endswith(COUNTER)}
    fitting = Counter({"": 0})
    for name in checkpoint.weights:
        fitting.update(prefix for prefix in _prefixes(name) if name[len(prefix) :] in keys)
    most = max(fitting.values())
    best = sorted((prefix for prefix in fitting if fitting[prefix] == most), key=lambda prefix: (len(prefix), prefix))
    if most < len(keys) or len(best) == 1:
        return best[0], set()
    known = [prefix for prefix in best if _is_held(prefix)]
    if len(known) != 1:
        names = ", ".join(prefix or "no prefix" for prefix in best)
        raise WeightsError(
            f"{checkpoint.path} holds the weights of several networks that fit ({names}); save the one you mean alone"
        )
    return known[0], set(best) - {known[0]}


def _is_beside(name: str, tensor: Tensor, prefix: str, own: Set[str]) -> bool:
    """Whether a tensor is of no layer of the network, whose names begin with ``prefix`` and then ``own``."""
    if name.startswith(prefix) if prefix else name.partition(".")[0] in own:
        return False
    if BESIDE.search(name):
        return True
    if NORMALISING.search(name):
        return False
    counter = not tensor.is_floating_point() or (tensor.ndim == 0 and "." not in name)
    return counter or (bool(prefix) and _is_held(prefix) and tensor.ndim < 2)


def _is_held(prefix: str) -> bool:
    return set(prefix.split(".")[:-1]) <= HOLDERS


def _prefixes(name: str) -> Iterator[str]:
    """Beginnings of a name that end in a dot, and the empty one."""
    yield ""
    parts = name.split(".")[:-1]
    for count in range(1, min(len(parts), MOST_HELD) + 1):
        yield ".".join(parts[:count]) + "."


def _is_whole(tensor: Tensor) -> bool:
    """Whether all are whole numbers, of any type."""
    if tensor.is_complex():
        return False
    return not tensor.is_floating_point() or bool((tensor.double() == tensor.double().round()).all())
