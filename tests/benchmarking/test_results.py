import csv
import json
from dataclasses import asdict, replace

import pytest
from matplotlib.text import Text

from backdoor_gym.benchmarking import Result, figures
from backdoor_gym.benchmarking.cells import CellFile, Conditions
from backdoor_gym.benchmarking.resuming import RowFile, run_tasks
from backdoor_gym.benchmarking.tables import infected_table, markdown, points, write_csv
from backdoor_gym.errors import DataError


def result(model, policy, acc, asr, seed=0, budget=0.02, asr_before=1.0):
    known = asr is not None
    conditions = {"max_failures": 5, "max_steps": 100}
    der = (max(0, asr_before - asr) - max(0, 0.9 - acc) + 1) / 2 if known else None
    return Result(
        model, policy, budget, seed, "", conditions, "badnets", "small_cnn", 100, 5, 0.9, asr_before if known else None,
        0.0, acc, asr, 0.5, der, 1.0, 2**20,
    )  # fmt: skip


def test_the_table_has_means_spreads_and_the_best_in_bold():
    results = [
        result("a", "good", 0.88, 0.1),
        result("b", "good", 0.86, 0.3),
        result("a", "seeded", 0.89, 0.9, seed=0),
        result("a", "seeded", 0.87, 0.7, seed=1),
        result("b", "seeded", 0.89, 0.8, seed=0),
        result("b", "seeded", 0.89, 0.8, seed=1),
    ]
    good, seeded = infected_table(results)[2:]
    assert good.startswith("| good | 2 | 1 | 3.00 ± 1.41 | **0.200** ± 0.141 |")
    assert seeded.startswith("| seeded | 2 | 2 | **1.50** ± 0.71 | 0.800 ± 0.000 |")
    assert "**0.885** ± 0.078" in good
    text = markdown([*results, result("c", "good", 0.9, None), replace(results[0], error="ValueError: no", model="d")])
    assert "Budget of 2 points" in text
    assert [points(budget) for budget in (0.01, 0.005, 0.1)] == ["1 point", "0.5 points", "10 points"]
    assert "| good | 1 | 0.00 | 0.00 | 5.0 |" in text
    assert "good on d (Budget of 2 points on the defender's images, seed 0): ValueError: no" in text


def result_of(**own):
    return replace(
        Result("a model", "clp", 0.02, 0, "clp", asdict(Conditions())),
        **{"acc": 0.5, "acc_before": 0.9, "asr": 0.5, "asr_before": 0.9, "der": 0.5, "pruned": 3, **own},
    )


def test_text_in_the_sheet_is_no_formula_and_numbers_are_numbers(tmp_path):
    texts = ["=1+2", "+1", "-1", "@sum(a)", "\t=1", "\r=1", " =1", "\uff1d1", "a\nb", "a,b", "plain", "'=1", ""]
    results = [result_of(attack=text, der=-0.25 - index, pruned=-index) for index, text in enumerate(texts)]
    write_csv(results, tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open(encoding="utf-8", newline="") as sheet:
        rows = list(csv.DictReader(sheet))
    assert [row["attack"] for row in rows] == [
        "'=1+2", "'+1", "'-1", "'@sum(a)", "'\\t=1", "'\\r=1", "' =1", "'\uff1d1", "a\\nb", "a,b", "plain", "'=1", "",
    ]  # fmt: skip
    assert [float(row["der"]) for row in rows] == [result.der for result in results]
    assert [int(row["pruned"]) for row in rows] == [result.pruned for result in results]
    assert len((tmp_path / "cells.csv").read_bytes().splitlines()) == len(texts) + 1


def test_no_text_breaks_a_table():
    bad = "a|b\n|c\\|<b>[x](y)`"
    shown = "a\\|b\\n\\|c\\\\\\|&lt;b>\\[x](y)\\`"
    for result in (result_of(policy=bad), result_of(policy=bad, der=None)):
        row = next(line for line in markdown([result]).splitlines() if "&lt;" in line)
        assert row.startswith(f"| {shown} | 1 |")
    failed = markdown([result_of(policy=bad, model=bad, error=f"ValueError: {bad}")])
    assert f"- {shown} on {shown} (Budget of 2 points on the defender's images, seed 0): ValueError: a\\|b\n" in failed


def test_names_in_figures_are_no_formulas(tmp_path):
    result = result_of(model="$\\frac{\x1b$", policy="$x_{$\udc80", attack="$\n$", asr=0.5)
    assert [path.stat().st_size > 1000 for path in figures.draw([result], tmp_path)] == [True] * 3


def test_names_in_figures_are_of_bearable_length():
    results = [
        result_of(model=f"{name}{'m' * 10**5}", policy="p" * 10**5, attack="\n".join("a" * 10**5)) for name in "ab"
    ]
    for picture in (figures.acc_against_asr, figures.der_by_attack, figures.der_by_model):
        texts = [text.get_text() for text in picture(results).findobj(Text)]
        assert max(map(len, texts)) < 300
        assert all(text.isprintable() for text in texts)


def test_results_have_no_figures_that_are_not_finite():
    line = result_of(der=float("nan"), acc=float("inf")).as_json()
    assert (Result.from_json(line).der, Result.from_json(line).acc) == (None, None)
    json.loads(line, parse_constant=pytest.fail)


def test_half_a_line_of_a_killed_process_does_not_spoil_the_next(tmp_path):
    file = CellFile(tmp_path / "cells.jsonl")
    first, second = result_of(), result_of(attack="x" * 10_000)
    file.add(first)
    for half in (second.as_json()[:7], second.as_json()):
        with file.path.open("a", encoding="utf-8") as lines:
            lines.write(half)
        assert file.read_all()[0] == first
        file.add(second)
    assert file.read_all() == [first, second, second]


def test_a_file_of_somebody_else_is_left_as_it_is(tmp_path):
    file = CellFile(tmp_path / "cells.jsonl")
    file.path.write_text('{"mine": 1}')
    for change in (file.read_all, lambda: file.add(result_of())):
        with pytest.raises(DataError, match="is not of a benchmark"):
            change()
    assert file.path.read_text() == '{"mine": 1}'


def square(number, file):
    file.add(number=number, square=number**2)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_measurement_does_only_what_is_missing(tmp_path, jobs):
    file = RowFile(tmp_path / "rows.jsonl", ("number",))
    file.add(number=2, square="known")
    with file.path.open("a", encoding="utf-8") as lines:
        lines.write('{"number": 3, "squ')  # killed while it wrote
    tasks = [(number,) for number in range(1, 5)]
    assert file.missing(tasks) == [(1,), (3,), (4,)]
    run_tasks(square, file.missing(tasks), file, jobs)
    assert {row["number"]: row["square"] for row in file.rows()} == {2: "known", 1: 1, 3: 9, 4: 16}
    assert file.missing(tasks) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"acc"', b'"acd"'),
        lambda line: line.replace(b'"onp"', b'"on\xff"', 1),
        lambda line: line.replace(b'"seed": 0', b'"seed": -1'),
        lambda line: line.replace(b'"seed": 0', b'"seed": true'),
        lambda line: line.replace(b'"acc": 0.9', b'"acc": 90.0'),
        lambda line: line.replace(b'"acc": 0.9', b'"acc": NaN'),
        lambda line: line.replace(b'"pruned": null', b'"pruned": 1' + b"0" * 400),
        lambda line: line.replace(b'"peak_memory": null', b'"peak_memory": 1' + b"0" * 400),
        lambda line: line.replace(b'"der": null', b'"der": 0.5'),
        lambda line: line[:-1] + b', "more": 1}',
        lambda line: b"[" * 100_000,
        lambda line: b"[1]",
    ],
)
def test_a_line_that_is_no_result_is_refused(tmp_path, change):
    file = CellFile(tmp_path / "cells.jsonl")
    file.add(Result("digits-clean", "onp", None, 0, "onp", {}, acc=0.9))
    assert [result.acc for result in file.read_all()] == [0.9]
    line = file.path.read_bytes().strip()
    assert change(line) != line
    file.path.write_bytes(change(line) + b"\n")
    with pytest.raises(DataError, match="not a result of a benchmark"):
        file.read_all()
