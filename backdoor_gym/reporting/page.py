"""The report: everything that the template needs, and the page."""

import hashlib
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor, nn

from ..attacks.targets import target_labels
from ..metrics import predict_logits
from ..policies.registry import is_onp
from ..wording import printable
from ..writing import write_text
from . import pictures
from .conclusion import conclude
from .reasons import Reasons, reasons

if TYPE_CHECKING:
    from .result import RepairResult

#: Images that the samples are chosen from, and samples that are shown.
LOOKED_AT, SHOWN = 200, 8
#: Pairs of images without and with a trigger that are shown, of the known one and of each inverted one.
PAIRS, PAIRS_INVERTED = 6, 3
#: Pruned neurons that are listed, and characters of a text out of a file that are shown.
MOST_ROWS, MOST_CHARACTERS = 150, 2000
VERSIONS = ("backdoor-gym", "torch", "numpy", "gymnasium", "stable-baselines3")

LOADING_OURS = """\
from backdoor_gym import load_infected

network = load_infected("repaired.safetensors").network.eval()  # images in [0, 1] to logits"""
LOADING_TRANSFORMERS = """\
from transformers import AutoModelForImageClassification

network = AutoModelForImageClassification.from_pretrained(".")"""
LOADING_MODULE = """\
{torch}from safetensors.torch import load_file

network = {name}(...)  # made as you made the original
{norms_off}network.load_state_dict(load_file("{file}"))
network.eval()"""


class Answer(NamedTuple):
    """What a network said of an image: the label, and its probability."""

    label: int
    probability: float


class Sample(NamedTuple):
    """Data URIs of an image and of what was made of it, its true label, and what the network said before and after."""

    images: list[Markup]
    label: int
    before: Answer
    after: Answer


class Row(NamedTuple):
    """A neuron that stayed pruned: by which prune, why, and the figures on clean images after that prune."""

    number: int
    name: str
    reasons: Reasons
    acc: float
    suspected_danger: float | None


def write_report(result: "RepairResult", path: str | Path) -> None:
    """Write the page alone; ``WriteError`` where the file cannot be written."""
    write_text(Path(path), render(result))


def render(result: "RepairResult", command: str | None = None) -> str:
    """The page of a repair, HTML; ``command`` is the command line that asked for it, if one did."""
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
    model = result.infected
    weights = "repaired.safetensors" if model.layout is None else "model.safetensors"
    facts = {"architecture": model.architecture, **model.facts}
    return environment.get_template("report.html.j2").render(
        result=result,
        name=_short(model.name),
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
        loading=_loading(result, weights),
        weights=weights,
        repeating=command or _repeating(result),
        facts={_short(str(key)): _short(str(value), 300) for key, value in facts.items() if value is not None},
        versions={name: version(name) for name in VERSIONS} | {"Python": platform.python_version()},
        digests={"before": digest(model.module), "after": digest(result.module)},
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def digest(network: nn.Module) -> str:
    """SHA-256 of all weights, the first 16 digits: tells which network it was."""
    summed = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        summed.update(name.encode())
        summed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return summed.hexdigest()[:16]


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
    stayed = set(result.pruned)
    rows = [
        Row(number, name, reasons(result.features[result.neurons.index(name)]), change.acc, change.suspected_danger)
        for number, change in enumerate(result.course, 1)
        if not change.given_back
        for name in change.neurons
        if name in stayed
    ]
    return rows[:MOST_ROWS]


def _titles(result: "RepairResult") -> list[str]:
    """What each neuron says of itself in the drawing."""
    titles = []
    for name, features, kept in zip(result.neurons.names, result.features, result.mask, strict=True):
        chips = ", ".join(f"{chip.label} {chip.score:+.1f}" for chip in reasons(features).chips[:3])
        titles.append(f"{_short(name)}{'' if kept else ', pruned'}{': ' if chips else ''}{chips}")
    return titles


def _answers(result: "RepairResult", images: Tensor) -> list[tuple[Answer, Answer]]:
    """What the network said of each image before and after the repair."""
    both = []
    for network in (result.infected.network, result.network):
        chances = predict_logits(network, images).softmax(1).max(1)
        both.append([Answer(int(label), float(chance)) for chance, label in zip(*chances, strict=True)])
    return list(zip(*both, strict=True))


def _samples(result: "RepairResult") -> tuple[list[Sample], list[Sample], int]:
    """Images of many classes, those whose answer the repair changed, and how many were looked at."""
    images, labels = _unseen(result)
    answers = _answers(result, images)

    def sample(index: int) -> Sample:
        return Sample([pictures.image_uri(images[index])], labels[index], *answers[index])

    changed = [index for index, (before, after) in enumerate(answers) if before.label != after.label]
    # The first of each class, then the second, ...
    ranks = sorted((labels[:index].count(label), label, index) for index, label in enumerate(labels))
    varied = [index for *_, index in ranks if index not in changed][:SHOWN]
    return [sample(index) for index in varied], [sample(index) for index in changed], len(images)


def _unseen(result: "RepairResult") -> tuple[Tensor, list[int]]:
    """Test images where there are some, else the defender's, with their labels."""
    model = result.infected
    unseen = (model.clean if model.test is None else model.test).first(LOOKED_AT)
    return unseen.images, unseen.labels.tolist()


def _triggered(result: "RepairResult") -> list[Sample]:
    """Images of other labels than the target without and with the trigger; none where it is not known."""
    model = result.infected
    if model.trigger is None or model.target is None:
        return []
    images, labels = _unseen(result)
    targets = target_labels(torch.tensor(labels), model.target, model.num_classes).tolist()
    others = [index for index, label in enumerate(labels) if label != targets[index]][:PAIRS]
    return _pairs(result, images[others], model.trigger(images[others].clone()), [labels[index] for index in others])


def _pairs(result: "RepairResult", images: Tensor, changed: Tensor, labels: list[int]) -> list[Sample]:
    """Images, what was made of them, and the difference."""
    changed = changed[: len(images)]
    samples = []
    for image, other, label, (before, after) in zip(images, changed, labels, _answers(result, changed), strict=False):
        shown = image, other, pictures.difference(image, other)
        samples.append(Sample([pictures.image_uri(picture) for picture in shown], label, before, after))
    return samples


def _inverted(result: "RepairResult") -> list[dict[str, Any]]:
    """Of each family of the inverted trigger: its name, samples, and how often it works before and after."""
    trigger = result.evidence.inverted
    if trigger is None:
        return []
    clean = trigger.clean.cpu().contiguous()
    labels = predict_logits(result.infected.network, clean).argmax(1).tolist()
    families = []
    for name, images in zip(trigger.families, trigger.images.cpu().split(len(clean)), strict=True):
        works = [
            (predict_logits(network, images).argmax(1) == trigger.target).double().mean().item()
            for network in (result.infected.network, result.network)
        ]
        samples = _pairs(result, clean[:PAIRS_INVERTED], images, labels)
        families.append({"name": name, "works": works, "samples": samples})
    return families


def _loading(result: "RepairResult", file: str) -> str:
    """Python that loads what ``RepairResult.save`` wrote."""
    if result.complete:
        return LOADING_OURS
    if result.infected.layout is not None and hasattr(result.module, "save_pretrained"):
        return LOADING_TRANSFORMERS
    off = result.norms_off
    return LOADING_MODULE.format(
        torch="import torch\n" if off else "",
        name=type(result.module).__name__,
        norms_off=f"# The repaired weights are plain ones, so these norms have to go first.\n{off}" if off else "",
        file=file,
    )


def _repeating(result: "RepairResult") -> str:
    """Python that does the repair again."""
    lines = []
    for key, value in result.arguments.items():
        as_object = value is None and key in ("infected", "policy")  # it was no name, but the thing itself
        lines.append(f"    {key}={key if as_object else repr(value)},\n")
    return f"from backdoor_gym import repair\n\nresult = repair(\n{''.join(lines)})"
