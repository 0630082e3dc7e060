"""The results as pictures: ACC against ASR, DER by attack, DER by model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..wording import one_line
from ..writing import beside
from .cells import Result
from .specifications import OWN
from .tables import over_seeds, points

PICTURES = ("acc_asr.png", "der_by_attack.png", "der_by_model.png")
DPI = 120
#: Characters of a name, and of one that is told in full.
MOST_SHORT, MOST_LONG = 60, 200
#: With ten colours, what policies are told apart by.
MARKERS = "osD^vP*X<>"


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what can be of infected models; the files.

    Raises:
        WriteError: the folder cannot be written.
    """
    infected = [result for result in results if result.der is not None]
    if not infected:
        return []
    with beside(folder) as new, rc_context({"text.parse_math": False}):  # names are no formulas
        for name, picture in zip(PICTURES, (acc_against_asr, der_by_attack, der_by_model), strict=True):
            figure = picture(infected)
            FigureCanvasAgg(figure)
            figure.savefig(new / name, dpi=DPI)
    return [folder / name for name in PICTURES]


def acc_against_asr(results: Sequence[Result]) -> Figure:
    """A panel for each budget: mean accuracy lost and mean ASR of each policy; the lower left corner is best."""
    budgets, labels = _budgets_and_labels(results)
    figure = Figure(figsize=(1.2 + 3.4 * len(budgets), 4.2), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for index, (policy, label) in enumerate(labels.items()):
            cells = [result for result in results if (result.policy, result.budget) == (policy, budget)]
            if cells:
                lost, asr = (over_seeds(cells, key) for key in ("acc_lost", "asr"))
                marker = MARKERS[
                    (index + index // 10) % len(MARKERS)
                ]  # ten colours and ten markers tell a hundred apart
                place = [100 * mean(lost)], [100 * mean(asr)]
                axes.plot(*place, marker, color=f"C{index % 10}", markersize=8, label=label)
        axes.set_title(_title(budget))
        axes.set_xlabel("ACC lost (points)")
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ASR (%)")
    _add_legend(figure, panels, "outside right center")
    return figure


def der_by_attack(results: Sequence[Result]) -> Figure:
    """A panel for each budget: mean DER of each policy on the models of each attack."""
    budgets, labels = _budgets_and_labels(results)
    attacks = sorted({result.attack for result in results})
    size = max(6.4, 0.22 * len(labels) * len(attacks) + 3), 2.6 * len(budgets)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(budgets), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(labels)
    for axes, budget in zip(panels, budgets, strict=True):
        for index, (policy, label) in enumerate(labels.items()):
            cells = [result for result in results if (result.policy, result.budget) == (policy, budget)]
            ders = [over_seeds([cell for cell in cells if cell.attack == attack], "der") for attack in attacks]
            places = np.arange(len(attacks)) + (index - (len(labels) - 1) / 2) * width
            axes.bar(places, [mean(der) if der else 0 for der in ders], width, color=f"C{index % 10}", label=label)
        axes.set_title(_title(budget))
        axes.set_ylabel("DER")
        axes.set_ylim(_least(results), 1.0)  # doing nothing is 0.5
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(np.arange(len(attacks)), [_short(attack) for attack in attacks])
    _add_legend(figure, panels, "outside right upper")
    return figure


def der_by_model(results: Sequence[Result]) -> Figure:
    """A heat map for each budget: DER of each policy on each model, models in order of attack."""
    budgets, labels = _budgets_and_labels(results)
    attack_of = {result.model: result.attack for result in sorted(results, key=lambda result: result.attack)}
    size = 3.2 + (1.1 + 0.32 * len(labels)) * len(budgets), 2.2 + 0.17 * len(attack_of)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    picture: Any = None
    for axes, budget in zip(panels, budgets, strict=True):
        ders = np.full((len(attack_of), len(labels)), np.nan)
        for row, model in enumerate(attack_of):
            for column, policy in enumerate(labels):
                cell = model, policy, budget
                cells = [result for result in results if (result.model, result.policy, result.budget) == cell]
                ders[row, column] = next(iter(over_seeds(cells, "der")), np.nan)
        limits = {"vmin": _least(results), "vmax": 1.0}
        picture = axes.imshow(ders, aspect="auto", cmap="viridis", interpolation="nearest", **limits)
        axes.set_title(_title(budget), fontsize=9)
        axes.set_xticks(range(len(labels)), list(labels.values()), rotation=90, fontsize=8)
    names = [f"{_short(model)} ({_short(attack)})" for model, attack in attack_of.items()]
    panels[0].set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(picture, ax=list(panels), label="DER", shrink=0.6)
    return figure


def _budgets_and_labels(results: Sequence[Result]) -> tuple[list[float | None], dict[str, str]]:
    """What there are panels of, and what each policy is called; files of the same name by all of their paths."""
    policies = dict.fromkeys(result.policy for result in results)
    count = Counter(map(_short, policies))
    labels = {
        policy: _short(policy) if count[_short(policy)] == 1 else one_line(policy, MOST_LONG) for policy in policies
    }
    return list(dict.fromkeys(result.budget for result in results)), labels


def _add_legend(figure: Figure, panels: Any, place: Any) -> None:
    """With each policy once, whichever panels it is in."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc=place, frameon=False)


def _least(results: Sequence[Result]) -> float:
    """Lower end of the DER in pictures."""
    return min([0.4, *(result.der for result in results if result.der is not None)])


def _short(name: str) -> str:
    """A file is called by its name alone."""
    return one_line(Path(name).stem if name.endswith(".safetensors") else name, MOST_SHORT)


def _title(budget: float | None) -> str:
    return "as published" if budget is OWN else f"budget of {points(budget)}"
