"""The results as CSV and as Markdown."""

import csv
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..writing import escaped, write_text
from .cells import OWN, Result

#: What the text of a formula begins with, also as Chinese and Japanese keyboards write it.
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")

#: Heading, figure of a result, factor, digits, and whether more is better.
COLUMNS: tuple[tuple[str, Callable[[Result], float | None], float, int, bool | None], ...] = (
    ("ACC lost (points)", lambda result: result.acc_lost, 100, 2, False),
    ("ASR", lambda result: result.asr, 1, 3, False),
    ("RA", lambda result: result.ra, 1, 3, True),
    ("DER", lambda result: result.der, 1, 3, True),
    ("pruned", lambda result: result.pruned, 1, 1, None),
    ("seconds", lambda result: result.seconds, 1, 1, None),
    ("peak memory (MiB)", lambda result: result.peak_memory, 1 / 2**20, 0, None),
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
    quoted = f"'{value}" if value.lstrip()[:1] in FORMULA or value[:1].isspace() else value
    return escaped(quoted)


def _cell(text: str) -> str:
    """Text of a model, a policy or an error within a table or a list of Markdown, which it neither breaks nor formats."""
    for mark, replacement in (("\\", "\\\\"), ("|", "\\|"), ("[", "\\["), ("`", "\\`"), ("<", "&lt;")):
        text = text.replace(mark, replacement)
    return escaped(text)


def markdown(results: Sequence[Result]) -> str:
    """A table for each budget, of infected models and of those without a known trigger, and what went wrong."""
    right = [result for result in results if not result.error]
    parts = ["# Pruning policies on infected models"]
    for budget in dict.fromkeys(result.budget for result in right):
        mine = [result for result in right if result.budget == budget]
        infected = [result for result in mine if result.der is not None]
        others = [result for result in mine if result.der is None]
        parts.append(f"## {_title(budget)}")
        if infected:
            parts.append("\n".join(infected_table(infected)))
        if others:
            parts.append("Models without a known trigger:\n\n" + "\n".join(untriggered_table(others)))
    wrong = [result for result in results if result.error]
    if wrong:
        lines = [
            f"- {_cell(result.policy)} on {_cell(result.model)} ({_title(result.budget)}, seed {result.seed}): "
            f"{_cell(result.error.splitlines()[0])}"
            for result in wrong
        ]
        parts.append("## Failed\n\n" + "\n".join(lines))
    parts.append(
        "Means over models, ± the standard deviation over models (the figures of a policy with several seeds are its means over "
        "them first). The best of a column is bold. Seconds contain making the model ready."
    )
    if right:
        conditions = right[0].conditions
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
    policies = list(dict.fromkeys(result.policy for result in results))
    figures = {
        policy: [over_seeds([one for one in results if one.policy == policy], figure) for _, figure, *_ in COLUMNS]
        for policy in policies
    }
    best = []
    for index, (*_, more) in enumerate(COLUMNS):
        means = {policy: mean(found[index]) for policy, found in figures.items() if found[index]}
        best.append(None if more is None or not means else (max if more else min)(means.values()))
    text = [
        f"| policy | models | seeds | {' | '.join(heading for heading, *_ in COLUMNS)} |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for policy, found in figures.items():
        mine = [one for one in results if one.policy == policy]
        cells = []
        for values, top, (_, _, factor, digits, _) in zip(found, best, COLUMNS, strict=True):
            if not values:
                cells.append("")
                continue
            spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
            cell = f"{factor * mean(values):.{digits}f}"
            cells.append(f"**{cell}**{spread}" if mean(values) == top else f"{cell}{spread}")
        models, seeds = len({one.model for one in mine}), len({one.seed for one in mine})
        text.append(f"| {_cell(policy)} | {models} | {seeds} | {' | '.join(cells)} |")
    return text


def untriggered_table(results: Sequence[Result]) -> list[str]:
    """Accuracy lost where there may be nothing to repair, and how often nothing was pruned."""
    text = ["| policy | models | ACC lost (points) | untouched | pruned |", "|---|---|---|---|---|"]
    for policy in dict.fromkeys(result.policy for result in results):
        mine = [one for one in results if one.policy == policy]
        lost = over_seeds(mine, lambda result: result.acc_lost)
        text.append(
            f"| {_cell(policy)} | {len({one.model for one in mine})} | {f'{100 * mean(lost):.2f}' if lost else ''} | "
            f"{mean(one.pruned == 0 for one in mine):.2f} | {mean(one.pruned or 0 for one in mine):.1f} |"
        )
    return text


def over_seeds(results: Iterable[Result], figure: Callable[[Result], float | None]) -> list[float]:
    """A figure of each model, the mean over seeds; those where it is not known are left out."""
    by_model: dict[str, list[float]] = {}
    for result in results:
        value = figure(result)
        if value is not None:
            by_model.setdefault(result.model, []).append(value)
    return [mean(values) for values in by_model.values()]
