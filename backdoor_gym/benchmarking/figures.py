"""The results as pictures: ACC against ASR, DER by attack, DER by model."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..wording import printable
from ..writing import beside
from .cells import OWN, Result
from .tables import over_seeds, points

PICTURES = ("acc_asr.png", "der_by_attack.png", "der_by_model.png")
DPI = 120
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
        for name, figure in zip(
            PICTURES, (acc_against_asr(infected), der_by_attack(infected), der_by_model(infected)), strict=True
        ):
            FigureCanvasAgg(figure)
            figure.savefig(new / name, dpi=DPI)
    return [folder / name for name in PICTURES]


def acc_against_asr(results: Sequence[Result]) -> Figure:
    """A panel for each budget: mean accuracy lost and mean ASR of each policy; the lower left corner is best."""
    budgets, policies = _budgets(results), _policies(results)
    labels = _labels(policies)
    figure = Figure(figsize=(1.2 + 3.4 * len(budgets), 4.2), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for index, policy in enumerate(policies):
            mine = [one for one in results if one.policy == policy and one.budget == budget]
            if not mine:
                continue
            lost, asr = (over_seeds(mine, key) for key in (lambda one: one.acc_lost, lambda one: one.asr))
            axes.plot(
                [100 * mean(lost)],
                [100 * mean(asr)],
                _marker(index),
                color=_colour(index),
                markersize=8,
                label=labels[policy],
            )
        axes.set_title(_title(budget))
        axes.set_xlabel("ACC lost (points)")
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ASR (%)")
    figure.legend(*_entries(panels), loc="outside right center", frameon=False)
    return figure


def der_by_attack(results: Sequence[Result]) -> Figure:
    """A panel for each budget: mean DER of each policy on the models of each attack."""
    budgets, policies = _budgets(results), _policies(results)
    labels = _labels(policies)
    attacks = sorted({result.attack for result in results})
    figure = Figure(
        figsize=(max(6.4, 0.22 * len(policies) * len(attacks) + 3), 2.6 * len(budgets)), layout="constrained"
    )
    panels = figure.subplots(len(budgets), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(policies)
    for axes, budget in zip(panels, budgets, strict=True):
        for index, policy in enumerate(policies):
            mine = [one for one in results if one.policy == policy and one.budget == budget]
            heights = [over_seeds([one for one in mine if one.attack == attack], _der) for attack in attacks]
            places = np.arange(len(attacks)) + (index - (len(policies) - 1) / 2) * width
            axes.bar(
                places, [mean(one) if one else 0 for one in heights], width, color=_colour(index), label=labels[policy]
            )
        axes.set_title(_title(budget))
        axes.set_ylabel("DER")
        axes.set_ylim(_least(results), 1.0)  # doing nothing is 0.5
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(np.arange(len(attacks)), [printable(attack) for attack in attacks])
    figure.legend(*_entries(panels), loc="outside right upper", frameon=False)
    return figure


def der_by_model(results: Sequence[Result]) -> Figure:
    """A heat map for each budget: DER of each policy on each model, models in order of attack."""
    budgets, policies = _budgets(results), _policies(results)
    labels = _labels(policies)
    models = list(dict.fromkeys(one.model for one in sorted(results, key=lambda one: one.attack)))
    attack_of = {one.model: one.attack for one in results}
    columns = 1.1 + 0.32 * len(policies)
    figure = Figure(figsize=(3.2 + columns * len(budgets), 2.2 + 0.17 * len(models)), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    picture = None
    for axes, budget in zip(panels, budgets, strict=True):
        values = np.full((len(models), len(policies)), np.nan)
        for row, model in enumerate(models):
            for column, policy in enumerate(policies):
                mine = [r for r in results if (r.model, r.policy, r.budget) == (model, policy, budget)]
                found = over_seeds(mine, _der)
                if found:
                    values[row, column] = found[0]
        picture = axes.imshow(
            values, aspect="auto", vmin=_least(results), vmax=1.0, cmap="viridis", interpolation="nearest"
        )
        axes.set_title(_title(budget), fontsize=9)
        axes.set_xticks(range(len(policies)), list(labels.values()), rotation=90, fontsize=8)
    panels[0].set_yticks(
        range(len(models)),
        [f"{_short(model)} ({printable(attack_of[model])})" for model in models],
        fontsize=6,
    )
    assert picture is not None
    figure.colorbar(picture, ax=list(panels), label="DER", shrink=0.6)
    return figure


def _entries(panels: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend with each policy once, whichever panels it is in."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    return list(entries.values()), list(entries)


def _least(results: Sequence[Result]) -> float:
    """Lower end of the DER in pictures."""
    return min([0.4, *(result.der for result in results if result.der is not None)])


def _der(result: Result) -> float | None:
    return result.der


def _budgets(results: Sequence[Result]) -> list[float | None]:
    return list(dict.fromkeys(result.budget for result in results))


def _policies(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.policy for result in results))


def _labels(policies: Sequence[str]) -> dict[str, str]:
    """What each policy is called, in their order; files of the same name by all of their paths."""
    count = Counter(map(_short, policies))
    return {policy: _short(policy) if count[_short(policy)] == 1 else printable(policy) for policy in policies}


def _short(name: str) -> str:
    """A file is called by its name alone."""
    return printable(Path(name).stem if name.endswith(".safetensors") else name)


def _title(budget: float | None) -> str:
    return "as published" if budget is OWN else f"budget of {points(budget)}"


def _colour(index: int) -> str:
    return f"C{index % 10}"


def _marker(index: int) -> str:
    """With ten colours, as many policies are told apart as there are pairs."""
    return MARKERS[(index + index // 10) % len(MARKERS)]
