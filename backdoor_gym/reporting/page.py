"""The report: everything that the template needs, and the page."""

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor, nn

from ..metrics import predict_logits
from ..policies import is_onp
from ..wording import printable
from ..writing import write_text
from ..zoo.datasets import LabelledImages
from ..zoo.targets import target_labels
from . import pictures
from .conclusion import conclude
from .reasons import Reasons, reasons

if TYPE_CHECKING:
    from ..repairing import RepairResult

#: Images that the samples are chosen from, and samples that are shown.
LOOKED_AT, SHOWN = 200, 8
#: Pairs of images without and with a trigger that are shown, of the known one and of each inverted one.
PAIRS, PAIRS_INVERTED = 6, 3
#: Pruned neurons that are listed, and characters of a text out of a file that are shown.
MOST_ROWS, MOST_CHARACTERS = 150, 2000
VERSIONS = ("backdoor-gym", "torch", "numpy", "gymnasium", "stable-baselines3")


@dataclass(frozen=True)
class Answer:
    """What a network said of an image: the label, and its probability."""

    label: int
    probability: float


@dataclass(frozen=True)
class Sample:
    """An image, and what the networks said of it.

    Attributes:
        images: data URIs, of the image and of what was made of it.
        label: its true label.
        before: the answer of the network as it came.
        after: that of the repaired one.
    """

    images: list[Markup]
    label: int
    before: Answer
    after: Answer


@dataclass(frozen=True)
class Row:
    """A neuron that stayed pruned.

    Attributes:
        number: of the prune that took it.
        name: of the neuron.
        reasons: why.
        acc: accuracy on the clean images after that prune.
        suspected_danger: after it, None where there is none.
    """

    number: int
    name: str
    reasons: Reasons
    acc: float
    suspected_danger: float | None


def write_report(result: "RepairResult", path: str | Path, command: str | None = None) -> Path:
    """Write the page of a repair.

    Args:
        result: the repair.
        path: the file.
        command: the command line that asked for it, if one did.

    Raises:
        WriteError: the file cannot be written.
    """
    path = Path(path)
    write_text(path, render(result, command))
    return path


def render(result: "RepairResult", command: str | None = None) -> str:
    """The page of a repair, HTML; see ``write_report``."""
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"percent": _percent, "points": _points}
    samples, changed, looked_at = _samples(result)
    return environment.get_template("report.html.j2").render(
        result=result,
        name=_short(result.infected.name),
        conclusion=conclude(result),
        course=pictures.course(result.snapshot),
        network=pictures.network(result.snapshot, _titles(result)),
        key=pictures.key(),
        rows=_rows(result),
        weighs_all=is_onp(result.policy),
        most_rows=MOST_ROWS,
        samples=samples,
        changed=changed,
        looked_at=looked_at,
        triggered=_triggered(result),
        inverted=_inverted(result),
        loading=_loading(result),
        weights="repaired.safetensors" if result.infected.layout is None else "model.safetensors",
        repeating=command or _repeating(result),
        facts=_facts(result),
        versions={name: version(name) for name in VERSIONS} | {"Python": platform.python_version()},
        digests={"before": digest(result.infected.module), "after": digest(result.module)},
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def digest(network: nn.Module) -> str:
    """SHA-256 of all weights, the first 16 digits: tells which network it was."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _shown(value: Any) -> Any:
    """Any text that is put in, unless this package wrote it as HTML."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value[:MOST_CHARACTERS])


def _short(name: str, most: int = 120) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"


def _points(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{100 * (after - before):+.1f} points"


def _rows(result: "RepairResult") -> list[Row]:
    """The first of those that stayed pruned, in the order in which they went."""
    stayed, rows = set(result.pruned), list[Row]()
    for number, change in enumerate(result.course, 1):
        if not change.given_back:
            for name in change.neurons:
                if name in stayed and len(rows) < MOST_ROWS:
                    why = reasons(result.features[result.neurons.index(name)])
                    rows.append(Row(number, name, why, change.acc, change.suspected_danger))
    return rows


def _titles(result: "RepairResult") -> list[str]:
    """What each neuron says of itself in the drawing."""
    titles = []
    for name, features, kept in zip(result.neurons.names, result.features, result.mask, strict=True):
        found = ", ".join(f"{chip.label} {chip.score:+.1f}" for chip in reasons(features).chips[:3])
        titles.append(f"{_short(name)}{'' if kept else ', pruned'}{': ' if found else ''}{found}")
    return titles


def _answers(network: nn.Module, images: Tensor) -> list[Answer]:
    chances = predict_logits(network, images).softmax(1).max(1)
    return [Answer(int(label), float(chance)) for chance, label in zip(*chances, strict=True)]


def _samples(result: "RepairResult") -> tuple[list[Sample], list[Sample], int]:
    """Images of many classes, those whose answer the repair changed, and how many were looked at."""
    some = _unseen(result).first(LOOKED_AT)
    before, after = (_answers(network, some.images) for network in (result.infected.network, result.network))
    labels = some.labels.tolist()
    turn: dict[int, int] = {}
    order = []
    for index, label in enumerate(labels):  # the first of each class, then the second, ...
        turn[label] = turn.get(label, 0) + 1
        order.append((turn[label], label, index))

    def sample(index: int) -> Sample:
        return Sample([pictures.image_uri(some.images[index])], labels[index], before[index], after[index])

    changed = [index for index in range(len(some)) if before[index].label != after[index].label]
    varied = [index for _, _, index in sorted(order) if index not in changed]
    return [sample(index) for index in varied[:SHOWN]], [sample(index) for index in changed], len(some)


def _unseen(result: "RepairResult") -> LabelledImages:
    """Test images where there are some, else the defender's."""
    return result.infected.clean if result.infected.test is None else result.infected.test


def _triggered(result: "RepairResult") -> list[Sample]:
    """Images of other labels than the target without and with the trigger; none where it is not known."""
    model = result.infected
    if model.trigger is None or model.target is None:
        return []
    some = _unseen(result).first(LOOKED_AT)
    wanted = target_labels(some.labels, model.target, model.num_classes)
    others = torch.nonzero(some.labels != wanted).flatten()[:PAIRS]
    return _pairs(result, some.images[others], model.trigger(some.images[others].clone()), some.labels[others].tolist())


def _pairs(result: "RepairResult", images: Tensor, changed: Tensor, labels: Iterable[int]) -> list[Sample]:
    changed = changed[: len(images)]
    before, after = (_answers(network, changed) for network in (result.infected.network, result.network))
    return [
        Sample([pictures.image_uri(one) for one in (image, made, pictures.difference(image, made))], label, was, now)
        for image, made, label, was, now in zip(images, changed, labels, before, after, strict=False)
    ]


def _inverted(result: "RepairResult") -> list[dict[str, Any]]:
    """Of each family of the inverted trigger: its name, samples, and how often it works before and after."""
    found = None if result.reading is None else result.reading.inverted
    if found is None:
        return []
    clean = found.clean.cpu().contiguous()
    families = []
    for name, images in zip(found.families, found.images.cpu().split(len(clean)), strict=True):
        labels = predict_logits(result.infected.network, clean).argmax(1).tolist()
        works = [
            (predict_logits(network, images).argmax(1) == found.target).double().mean().item()
            for network in (result.infected.network, result.network)
        ]
        families.append(
            {"name": name, "works": works, "samples": _pairs(result, clean[:PAIRS_INVERTED], images, labels)}
        )
    return families


def _loading(result: "RepairResult") -> str:
    """Python that loads what ``RepairResult.save`` wrote."""
    if result.complete:
        return (
            "from backdoor_gym import load_infected\n\n"
            'network = load_infected("repaired.safetensors").network.eval()  # images in [0, 1] to logits'
        )
    if result.infected.layout is not None and hasattr(result.module, "save_pretrained"):
        return (
            "from transformers import AutoModelForImageClassification\n\n"
            'network = AutoModelForImageClassification.from_pretrained(".")'
        )
    file = "repaired.safetensors" if result.infected.layout is None else "model.safetensors"
    off = result.norms_off
    return (
        f"{'import torch' + chr(10) if off else ''}from safetensors.torch import load_file\n\n"
        f"network = {type(result.module).__name__}(...)  # made as you made the original\n"
        f"{'# The repaired weights are plain ones, so these norms have to go first.' + chr(10) if off else ''}{off}"
        f'network.load_state_dict(load_file("{file}"))\n'
        "network.eval()"
    )


def _repeating(result: "RepairResult") -> str:
    """Python that does the repair again."""
    lines = []
    for key, value in result.arguments.items():
        as_object = value is None and key in ("infected", "policy")  # it was no name, but the thing itself
        lines.append(f"    {key}={key if as_object else repr(value)},\n")
    return f"from backdoor_gym import repair\n\nresult = repair(\n{''.join(lines)})"


def _facts(result: "RepairResult") -> dict[str, str]:
    """What the model says of itself."""
    facts = {"architecture": result.infected.architecture, **result.infected.facts}
    return {_short(str(key)): _short(str(value), 300) for key, value in facts.items() if value is not None}
