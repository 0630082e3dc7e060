"""The results as CSV and as Markdown."""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ..writing import escaped, write_text
from .cells import Result
from .specifications import OWN

#: What the text of a formula begins with, also as Chinese and Japanese keyboards write it.
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
#: What Markdown would read within a table or a list.
MARKS = str.maketrans({"\\": "\\\\", "|": "\\|", "[": "\\[", "`": "\\`", "<": "&lt;"})


class Column(NamedTuple):
    """A figure of results, as a table shows it; ``best`` picks the one in bold."""

    heading: str
    figure: str
    factor: float
    digits: int
    best: Any = None


COLUMNS = (
    Column("ACC lost (points)", "acc_lost", 100, 2, min),
    Column("ASR", "asr", 1, 3, min),
    Column("RA", "ra", 1, 3, max),
    Column("DER", "der", 1, 3, max),
    Column("pruned", "pruned", 1, 1),
    Column("seconds", "seconds", 1, 1),
    Column("peak memory (MiB)", "peak_memory", 1 / 2**20, 0),
)


def write_csv(results: Sequence[Result], file: Path) -> None:
    """A line for each result.

    Raises:
        WriteError: the file cannot be written.
    """
    names = [name for name in Result.__dataclass_fields__ if name != "conditions"]
    sheet = StringIO()
    writer = csv.writer(sheet)
    writer.writerow(names)
    writer.writerows([_plain(getattr(result, name)) for name in names] for result in results)
    write_text(file, sheet.getvalue())


def _plain(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    return escaped(f"'{value}" if value.lstrip()[:1] in FORMULA or value[:1].isspace() else value)


def _cell(text: str) -> str:
    """Text of a model, a policy or an error, which neither breaks nor formats a table or a list."""
    return escaped(text.translate(MARKS))


def markdown(results: Sequence[Result]) -> str:
    """A table for each budget, of infected models and of those without a known trigger, and what went wrong."""
    finished = [result for result in results if not result.error]
    parts = ["# Pruning policies on infected models"]
    for budget in dict.fromkeys(result.budget for result in finished):
        of_budget = [result for result in finished if result.budget == budget]
        infected = [result for result in of_budget if result.der is not None]
        others = [result for result in of_budget if result.der is None]
        parts.append(f"## {_title(budget)}")
        if infected:
            parts.append("\n".join(infected_table(infected)))
        if others:
            parts.append("Models without a known trigger:\n\n" + "\n".join(untriggered_table(others)))
    failures = [
        f"- {_cell(result.policy)} on {_cell(result.model)} ({_title(result.budget)}, seed {result.seed}): "
        f"{_cell(result.error.splitlines()[0])}"
        for result in results
        if result.error
    ]
    if failures:
        parts.append("## Failed\n\n" + "\n".join(failures))
    parts.append(
        "Means over models, ± the standard deviation over models (the figures of a policy with several seeds are its means over "
        "them first). The best of a column is bold. Seconds contain making the model ready."
    )
    if finished:
        conditions = finished[0].conditions
        parts.append(
            f"Every repair ends after {conditions['max_failures']} prunes that broke the budget, and under a budget after "
            f"{conditions['max_steps']} steps."
        )
    return "\n\n".join(parts) + "\n"


def _title(budget: float | None) -> str:
    return "As published" if budget is OWN else f"Budget of {points(budget)} on the defender's images"


def points(budget: float) -> str:
    """A share of accuracy in words: "1 point", "2 points"."""
    return f"{100 * budget:g} point{'' if f'{100 * budget:g}' == '1' else 's'}"


def infected_table(results: Sequence[Result]) -> list[str]:
    """Means and spreads over models, the best in bold."""
    figures = {
        policy: [over_seeds(cells, column.figure) for column in COLUMNS]
        for policy, cells in grouped(results, "policy").items()
    }
    tops = []
    for index, column in enumerate(COLUMNS):
        means = [mean(values[index]) for values in figures.values() if values[index]]
        tops.append(column.best(means) if column.best and means else None)
    text = [
        f"| policy | models | seeds | {' | '.join(column.heading for column in COLUMNS)} |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for policy, cells in grouped(results, "policy").items():
        shown = [_mean(*figure) for figure in zip(figures[policy], COLUMNS, tops, strict=True)]
        models, seeds = len({cell.model for cell in cells}), len({cell.seed for cell in cells})
        text.append(f"| {_cell(policy)} | {models} | {seeds} | {' | '.join(shown)} |")
    return text


def _mean(values: list[float], column: Column, top: float | None) -> str:
    """Mean and spread, "" of nothing."""
    if not values:
        return ""
    spread = f" ± {column.factor * stdev(values):.{column.digits}f}" if len(values) > 1 else ""
    bold = "**" if mean(values) == top else ""
    return f"{bold}{column.factor * mean(values):.{column.digits}f}{bold}{spread}"


def untriggered_table(results: Sequence[Result]) -> list[str]:
    """Accuracy lost where there may be nothing to repair, and how often nothing was pruned."""
    text = ["| policy | models | ACC lost (points) | untouched | pruned |", "|---|---|---|---|---|"]
    for policy, cells in grouped(results, "policy").items():
        lost = over_seeds(cells, "acc_lost")
        text.append(
            f"| {_cell(policy)} | {len({cell.model for cell in cells})} | {f'{100 * mean(lost):.2f}' if lost else ''} | "
            f"{mean(cell.pruned == 0 for cell in cells):.2f} | {mean(cell.pruned or 0 for cell in cells):.1f} |"
        )
    return text


def grouped(results: Iterable[Result], key: str) -> dict[str, list[Result]]:
    """The results of each policy, model, or what else ``key`` names."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(getattr(result, key), []).append(result)
    return groups


def over_seeds(results: Iterable[Result], figure: str) -> list[float]:
    """A figure of each model, the mean over seeds; those where it is not known are left out."""
    known = [result for result in results if getattr(result, figure) is not None]
    return [mean(getattr(cell, figure) for cell in cells) for cells in grouped(known, "model").values()]
