"""One network of somebody else, checked in a process of its own that ``compatibility.py`` starts.

It prints one JSON object a stage, each with all that is known so far: where the process is ended, the last one stands.
Weights are random (seeded), and no file is downloaded.

*Hooked* is the network under a mask without anything of this package: the author's own module is called, and whenever it
calls a convolution, a linear layer or a normalisation with a weight that a neuron layer names, what comes out is
multiplied by that layer's mask along the channels. Layers whose weights are never given to such a function as they are
(computed ones, slices) are left out of that comparison; ``hookable`` tells the share of neurons that is in it.
"""

import copy
import json
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compatibility_networks import IMAGES, NotBuiltError, logits_of, make_ready, prepare_imports
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRUNED, GROUPS_PRUNED = 0.15, 0.3
TOLERANCE = 1e-4
REPAIR_STEPS = 10
#: Steps of each search for a trigger, for ONP to run alone; the sample that is repaired has as many as a user's.
FEW = 2

Row = dict[str, Any]


# ---- the network of its author under a mask

#: Functions, and where the channels are in what comes out: None where that hangs on the weight.
FUNCTIONS: dict[Any, int | None] = {
    **{getattr(where, f"conv{n}d"): None for where in (F, torch) for n in (1, 2, 3)},
    F.linear: -1,
    **{where.batch_norm: 1 for where in (F, torch)},
    **{where.group_norm: 1 for where in (F, torch)},
    **{where.instance_norm: 1 for where in (F, torch)},
    **{where.layer_norm: -1 for where in (F, torch)},
    **({F.rms_norm: -1} if hasattr(F, "rms_norm") else {}),
}
BATCH_NORMS = (F.batch_norm, torch.batch_norm)


class Hooks(TorchFunctionMode):
    """Multiplies what layers answer by a mask, found by their weight alone; without masks it only looks."""

    def __init__(self, masks: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.masks = masks or {}
        #: ids of the weights that came by, and of weights and means of batch normalisations.
        self.seen: set[int] = set()
        self.batch_norms: list[tuple[int, int]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = function(*args, **kwargs)
        if function not in FUNCTIONS:
            return answer
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if function in BATCH_NORMS:
            names = ("running_mean", "weight")
            places = (1, 3) if function is F.batch_norm else (3, 1)
            mean, weight = (
                kwargs.get(name, args[place] if place < len(args) else None)
                for name, place in zip(names, places, strict=True)
            )
            if mean is not None:
                self.batch_norms.append((id(weight), id(mean)))
        for tensor in tensors:
            if not isinstance(tensor, nn.Parameter):
                continue
            self.seen.add(id(tensor))
            mask = self.masks.get(id(tensor))
            if mask is not None:
                axis = FUNCTIONS[function]
                axis = 1 - tensor.ndim if axis is None else axis
                axis %= answer.ndim
                answer = answer * mask.to(answer.dtype).reshape([-1 if i == axis else 1 for i in range(answer.ndim)])
        return answer


def weights_of(layer: Any) -> tuple[str, ...]:
    """Names of the parameters that hold a layer's mask."""
    weights = getattr(layer, "weights", None)
    return (f"{layer.module}.weight",) if weights is None else tuple(weights)


def parameter_of(network: nn.Module, name: str) -> Tensor | None:
    """A parameter by name. What stands around the author's module holds the very same parameters."""
    return dict(network.named_parameters(remove_duplicate=False)).get(name)


def layer_mask(network: nn.Module, layer: Any, mask: np.ndarray, seen: set[int]) -> dict[int, Tensor] | None:
    """The mask of each weight of a layer, None where one of them never comes to a function as it is."""
    masks: dict[int, Tensor] = {}
    for name in weights_of(layer):
        weight = parameter_of(network, name)
        if weight is None or id(weight) not in seen or weight.shape[0] != layer.size:
            return None
        masks[id(weight)] = torch.from_numpy(mask[layer.neurons].astype(np.float32))
    return masks or None


class Logits(nn.Module):
    """A network that answers with logits alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor | None:
        return logits_of(self.module(images))


def forward(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits = logits_of(network(images.clone().contiguous()))
    assert logits is not None
    return logits


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


def rounding(network: nn.Module, images: Tensor) -> float:
    """How far float32 is from float64 on a network as its author runs it; 0 where it does not run in float64."""
    try:
        exact = forward(copy.deepcopy(network).double(), images.double())
    except Exception:  # other people's code
        return 0.0
    return distance(forward(network, images), exact)


# ---- checks


def check_neurons(row: Row, neurons: Any) -> None:
    row["neurons"], row["layers"] = len(neurons), len(neurons.layers)
    accounts = getattr(neurons, "accounts", None)
    if accounts is None:  # before layers were accounted for
        return
    row["coverage"] = round(float(neurons.coverage), 4)
    gaps = [account for account in accounts if not account.is_output and account.units < account.channels]
    gaps.sort(key=lambda account: account.units - account.channels)
    row["gaps"] = [[account.name, account.channels - account.units, account.reason] for account in gaps[:12]]
    row["gaps_without_reason"] = sum(not account.reason for account in gaps)


def check_masks(row: Row, module: nn.Module, network: nn.Module, neurons: Any, images: Tensor) -> None:
    """Masked, written and hooked answers, and whether all batch normalisations are known."""
    from backdoor_gym.masking.export import write_mask
    from backdoor_gym.masking.masked import MaskedNetwork

    kept = np.random.default_rng(0).random(len(neurons)) >= PRUNED
    half = kept | (np.arange(len(kept)) % 2 == 0)
    with Hooks() as watched:
        whole = forward(module, images)
    hooks: dict[int, Tensor] = {}
    hookable = np.zeros(len(neurons), dtype=bool)
    for layer in neurons.layers:
        masks = layer_mask(network, layer, kept, watched.seen)
        if masks is not None:
            hooks |= masks
            hookable[layer.neurons] = True
    partly = kept | ~hookable
    masked = MaskedNetwork(neurons, images)
    of_none = masked.logits(np.ones(len(neurons), dtype=bool)).clone()
    masked.logits(half)
    masked.keep()
    of_all, of_hooked = masked.logits(kept).clone(), masked.logits(partly).clone()
    edited = write_mask(network, neurons, kept)
    written = forward(edited, images)
    with Hooks(hooks):
        hooked = forward(module, images)
    of_whole, scale = (max(float(logits.abs().max()), 1e-6) for logits in (whole, written))
    errors = {
        "unmasked": distance(of_none, whole) / of_whole,
        "written": distance(of_all, written) / scale,
        "hooked": distance(of_hooked, hooked) / max(float(hooked.abs().max()), 1e-6),
    }
    allowed = TOLERANCE
    # Rounding is what float32 does to the author's own network, whole and with the zeros written into it.
    if not max(errors.values()) <= allowed:
        allowed += max(rounding(module, images) / of_whole, rounding(edited, images) / scale)
    row["masks"] = {
        **{name: float(f"{error:.2e}") for name, error in errors.items()},
        "allowed": float(f"{allowed:.2e}"),
        # What the mask does to the answers, and how far those of several images are from each other under it.
        "effect": float(f"{distance(whole, written) / of_whole:.2e}"),
        "varies": float(f"{float((written.amax(0) - written.amin(0)).max()) / scale:.2e}"),
        "hookable": round(float(hookable.mean()), 3),
        "right": all(error <= allowed for error in errors.values()),
    }
    _check_batch_norms(row, module, network, neurons, images, watched.batch_norms)


def _check_batch_norms(
    row: Row, module: nn.Module, network: nn.Module, neurons: Any, images: Tensor, called: Iterable[tuple[int, int]]
) -> None:
    """Those that the author's forward calls are a neuron layer's, between such, or accounted for by name."""
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    weights = {id(parameter_of(network, name)) for layer in neurons.layers for name in weights_of(layer)}
    told: set[str] = set()
    for layer in neurons.layers:
        for feeder in getattr(layer, "feeders", ()):
            told |= {*getattr(feeder, "norms", ()), getattr(feeder, "scale", None) or ""}
    for account in getattr(neurons, "accounts", ()):
        told |= {account.name} if account.reason else set()
    notes = [str(note) for note in getattr(neurons, "notes", ())]
    for note in notes:
        told |= {word.strip(".,:;`'") for word in note.split()}
    called = list(called)
    unseen: list[str] = []
    for weight, mean in called:
        name = names.get(weight, names.get(mean, "one without a name")).rpartition(".")[0]
        if weight not in weights and not any(word and (word == name or word.endswith(f".{name}")) for word in told):
            unseen.append(name)
    unseen = [name for name in unseen if _matters(module, name, images)]
    row["batch_norms"] = {"calls": len(called), "unseen": len(unseen), "first": unseen[:5]} | (
        {"notes": notes[:4]} if notes else {}
    )


def _matters(module: nn.Module, norm: str, images: Tensor) -> bool:
    """Whether the logits change with a batch normalisation: those of a branch that is thrown away do not."""
    weight = parameter_of(module, f"{norm}.weight")
    if weight is None:
        return True
    with Hooks({id(weight): torch.zeros(len(weight))}):
        without = forward(module, images)
    return not torch.equal(without, forward(module, images))


def check_clp(row: Row, network: nn.Module, clean: tuple[Tensor, Tensor]) -> None:
    from backdoor_gym.baselines import clp

    with torch.no_grad():
        pruned = clp.prune(network, clean=clean)
        row["clp"] = {"finite": bool(torch.isfinite(forward(pruned, clean[0][:1])).all())}
    try:
        clp.prune(network)
        row["clp"]["without_images"] = True
    except Exception as error:  # told in the table alone
        row["clp"]["without_images"] = _told(error)


def check_cut(row: Row, network: nn.Module, neurons: Any, images: Tensor) -> None:
    from backdoor_gym.masking.cutting import cut_channels
    from backdoor_gym.masking.export import write_mask

    groups = neurons.units("group")
    chosen = np.random.default_rng(1).permutation(len(groups))[: round(GROUPS_PRUNED * len(groups))]
    mask = np.ones(len(neurons), dtype=bool)
    for group in chosen:
        mask[groups[group]] = False
    written = forward(write_mask(network, neurons, mask), images)
    cut = cut_channels(network, neurons, mask, images)
    smaller, stops = cut.network, cut.stops
    scale = max(float(written.abs().max()), 1e-6)
    error = distance(forward(smaller, images), written) / scale
    before, after = (sum(p.numel() for p in each.parameters()) for each in (network, smaller))
    # Of neurons, not of channels: one may be several rows (queries and keys), or a channel that several layers write into.
    pruned = float((~mask).mean()) * row.get("coverage", 1.0)
    row["cut"] = {
        "error": float(f"{error:.2e}"),
        "equal": error <= TOLERANCE or error <= TOLERANCE + rounding(network, images) / scale,
        "pruned": round(pruned, 4),
        "smaller": round(1 - after / before, 4),
        "enough": 1 - after / before >= pruned / 2,
        "stops": [str(stop)[:200] for stop in stops][:8],
    }


def check_onp(row: Row, infected: Any, key: str, **options: Any) -> None:
    """A repair by the default policy; of the sample with all that comes behind it."""
    from backdoor_gym import repair

    start = time.perf_counter()
    with nullcontext() if key == "repair" else _few_steps():
        result = repair(infected, policy="onp", **options)
    row[key] = {"pruned": len(result.pruned), "steps": len(result.course)}
    if key == "repair":
        with tempfile.TemporaryDirectory() as folder:
            row[key]["files"] = len(result.save(folder))
    row[key]["seconds"] = round(time.perf_counter() - start, 1)


@contextmanager
def _few_steps() -> Iterator[None]:
    """Triggers are sought as always, in fewer steps: at 224 pixels a side they take nearly all the time."""
    from backdoor_gym.analysis import bn_evidence, label_inversion, trigger_inversion

    steps = (
        (trigger_inversion, "MEANS_STEPS"),
        (trigger_inversion, "TARGET_STEPS"),
        (label_inversion, "SHORT_STEPS"),
        (label_inversion, "STEPS"),
        (bn_evidence, "MOST_STEPS"),
    )
    usual = [getattr(module, name) for module, name in steps]
    try:
        for module, name in steps:
            setattr(module, name, FEW)
        yield
    finally:
        for (module, name), value in zip(steps, usual, strict=True):
            setattr(module, name, value)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"[:400]


def attempt(row: Row, stage: str, what: Callable[[], Any]) -> Any:
    """Do one stage; what it raises is told, by whether it is an error that the package raises on purpose."""
    from backdoor_gym.errors import BackdoorGymError

    row["stage"] = stage
    print(json.dumps(row), flush=True)
    start = time.perf_counter()
    try:
        return what()
    except BackdoorGymError as error:
        row[stage] = {"refused": _told(error)}
    except Exception as error:
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        row[stage] = {"untyped": _told(error), "where": " / ".join(frames[-8:])}
    finally:
        row.setdefault("seconds", {})[stage] = round(time.perf_counter() - start, 1)
    return None


def check(package: str, name: str, quick: bool, full_repair: bool) -> Row:
    """All stages of one network."""
    row: Row = {"package": package, "name": name, "stage": "build"}
    try:
        module, clean = make_ready(package, name)
    except NotBuiltError as error:
        return row | {"not_built": str(error)}
    row |= {"parameters": sum(p.numel() for p in module.parameters()), "image_size": clean.shape[-1]}
    images = clean[:IMAGES]
    clean = images if quick else clean
    logits = forward(module, clean)
    if not torch.isfinite(logits).all() or distance(forward(module, images), forward(module, images)) > 0:
        return row | {"not_built": "its own answers are not finite, or differ from call to call"}

    from backdoor_gym import InfectedModel
    from backdoor_gym.neurons.finding import find_neurons

    given = (clean, logits.argmax(1))
    infected = attempt(row, "from_module", lambda: InfectedModel.from_module(module, clean=given))
    if infected is None:  # told, and wrapped by hand to see what else there is
        infected = InfectedModel.from_module(Logits(module).eval(), clean=given)
    neurons = attempt(row, "find", lambda: find_neurons(infected.network, images))
    if neurons is None:
        return row
    row["found"] = True
    attempt(row, "account", lambda: check_neurons(row, neurons))
    attempt(row, "masks", lambda: check_masks(row, module, infected.network, neurons, images))
    if not quick:
        attempt(row, "clp", lambda: check_clp(row, infected.network, given))
        attempt(row, "cut", lambda: check_cut(row, infected.network, neurons, images))
        attempt(row, "onp", lambda: check_onp(row, infected, "onp", max_steps=2))
        if full_repair:
            attempt(row, "repair", lambda: check_onp(row, infected, "repair", max_steps=REPAIR_STEPS))
    return row


def main() -> None:
    asked = json.loads(sys.argv[1])
    # Seconds of the processor: others may keep it busy meanwhile.
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"] + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    prepare_imports(asked["package"])
    row = check(asked["package"], asked["name"], asked["quick"], asked["full_repair"])
    print(json.dumps(row | {"stage": "done"}), flush=True)


if __name__ == "__main__":
    main()
