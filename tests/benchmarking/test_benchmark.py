import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import backdoor_gym
from backdoor_gym.baselines import BNP, RandomPolicy
from backdoor_gym.benchmarking import OWN, Result, figures
from backdoor_gym.benchmarking.cells import CellFile, Conditions, all_cells
from backdoor_gym.benchmarking.figures import der_by_attack
from backdoor_gym.benchmarking.resuming import RowFile, run_tasks
from backdoor_gym.benchmarking.specifications import make, named, own_budget
from backdoor_gym.benchmarking.tables import infected_table, markdown, points, write_csv
from backdoor_gym.errors import DataError, UnknownNameError
from backdoor_gym.policies.contract import run_episode
from backdoor_gym.session.masked_model import MaskedVictim


@pytest.fixture
def files(infected, plain_infected, tmp_path):
    return [str(model.save(tmp_path / f"{model.name}.safetensors")) for model in (infected, plain_infected)]


def mine(env, seed):
    """A user's policy."""
    return RandomPolicy(seed)


def broken(env, seed):
    raise ValueError("it never worked")


def crashing(env, seed):
    """A policy that takes its process with it, on one of the two models."""
    if env.session.victim.model.facts["attack"] == "badnets":
        os.kill(os.getpid(), signal.SIGSEGV)
    return RandomPolicy(seed)


def test_a_process_that_dies_is_a_failed_cell_and_stops_no_other(files, tmp_path):
    policies = {"clp": "clp", "crash": crashing, "random": "random"}
    done = backdoor_gym.benchmark(files, policies, [0.05], out=tmp_path, jobs=2)
    assert len(done.results) == 6
    (failed,) = done.failed
    assert (failed.policy, Path(failed.model)) == ("crash", Path(files[0]))
    assert "SIGSEGV" in failed.error


def test_weights_alone_are_refused_before_any_cell(infected, files, tmp_path):
    torch.save(infected.network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"load_infected\(.*w\.pth"):
        backdoor_gym.benchmark([*files, str(tmp_path / "w.pth")], ["clp"], [0.05], out=tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_script_without_a_guard_is_told_of_it(files, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import backdoor_gym\nbackdoor_gym.benchmark({files!r}, ['clp'], [0.05], out='out', jobs=2)\n")
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "DataError" in ended.stderr.splitlines()[-1]
    assert "__main__" in ended.stderr.splitlines()[-1]


def test_every_cell_is_what_repair_does(files, tmp_path):
    done = backdoor_gym.benchmark(files, ["clp:1.5", "bnp"], [OWN, 0.03], out=tmp_path / "out", jobs=1)
    assert len(done.results) == 8
    assert not done.failed
    for result in done.results:
        name, _, threshold = result.policy.partition(":")
        options = {"u": float(threshold)} if threshold else {} if result.budget is OWN else {"threshold": "budget"}
        steps = None if result.budget is OWN else 100
        expected = backdoor_gym.repair(result.model, name, result.budget, max_steps=steps, **options)
        assert result.pruned == len(expected.pruned)
        assert (result.acc, result.asr, result.ra) == tuple(expected.after.as_dict().values())
        assert (result.acc_before, result.asr_before, result.ra_before) == tuple(expected.before.as_dict().values())
        assert result.der == expected.der
        assert result.seconds > 0
        assert result.architecture == "small_cnn"
    assert {result.attack for result in done.results} == {"badnets", "blended"}
    with (tmp_path / "out" / "cells.csv").open() as sheet:
        rows = list(csv.DictReader(sheet))
    assert [float(row["acc"]) for row in rows] == [result.acc for result in done.results]
    for name in ("table.md", "acc_asr.png", "der_by_attack.png", "der_by_model.png"):
        assert tmp_path / "out" / name in done.files
        assert (tmp_path / "out" / name).stat().st_size > 100


@pytest.mark.parametrize("jobs", [1, 2])
def test_models_of_ones_own_are_run_under_their_names(infected, files, tmp_path, jobs):
    own = replace(infected, name="mine")
    done = backdoor_gym.benchmark([own, files[0]], ["clp:1.5"], [OWN], out=tmp_path / "out", jobs=jobs)
    mine, saved = done.results
    assert (mine.model, saved.model) == ("mine", files[0])
    assert (mine.acc, mine.asr, mine.pruned) == (saved.acc, saved.asr, saved.pruned)
    with pytest.raises(DataError, match="names that differ"):
        backdoor_gym.benchmark([own, own], ["clp"], [OWN], out=tmp_path / "out", jobs=1)


def test_a_model_of_ones_own_with_other_weights_is_another_cell(infected, plain_infected, tmp_path):
    for model in (infected, plain_infected):
        done = backdoor_gym.benchmark(replace(model, name="mine"), ["clp:1.5"], [OWN], out=tmp_path / "out", jobs=1)
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 2
    assert len(done.results) == 1


def test_figures_call_files_of_policies_by_their_names(files, tmp_path):
    (one,) = backdoor_gym.benchmark(files[:1], ["random"], [0.02], out=tmp_path / "out", jobs=1).results
    names = ["bnp", "a/mine.safetensors", "a/same.safetensors", "b/same.safetensors"]
    figure = der_by_attack([replace(one, policy=name) for name in names])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["bnp", "mine", "a/same.safetensors", "b/same.safetensors"]


def test_what_is_done_is_not_done_again(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = backdoor_gym.benchmark(files[:1], ["clp"], [0.02], out=out, jobs=1)
    with (out / "cells.jsonl").open("a") as lines:
        lines.write('{"model": "half of a li')  # killed while it wrote
    second = backdoor_gym.benchmark(files, ["clp", "bnp"], [0.02], out=out, jobs=1)
    assert second.results[0] == first.results[0]
    assert len(second.results) == 4
    assert len(CellFile(out / "cells.jsonl").read_all()) == 4
    monkeypatch.setattr("backdoor_gym.benchmarking.running.run_model", None)
    again = backdoor_gym.benchmark(files, ["clp", "bnp"], [0.02], out=out, jobs=1)
    assert again.results == second.results
    monkeypatch.undo()
    fewer = backdoor_gym.benchmark(files[:1], ["clp"], [0.02], out=out, jobs=1, clean_samples=50)
    assert fewer.results[0].conditions["clean_samples"] == 50  # other conditions are another cell
    assert len(CellFile(out / "cells.jsonl").read_all()) == 5


def test_processes_give_the_same_and_users_policies_are_rows(files, tmp_path):
    policies = {"mine": mine, "imported": f"{__name__}:mine", "bnp": "bnp"}
    results = [
        backdoor_gym.benchmark(files, policies, [0.05], seeds=2, out=tmp_path / str(jobs), jobs=jobs).results
        for jobs in (1, 2)
    ]
    blank = [[replace(one, seconds=None, peak_memory=None) for one in found] for found in results]
    assert blank[0] == blank[1]
    cells = {one.cell for one in results[0]}
    assert {cell.seed for cell in cells if cell.policy == "mine"} == {0, 1}
    assert {cell.seed for cell in cells if cell.policy == "bnp"} == {0}
    by = {(one.model, one.policy, one.seed): one for one in blank[0]}
    for model in files:
        for seed in (0, 1):
            one, other = (by[model, policy, seed] for policy in ("mine", "imported"))
            assert replace(one, policy="imported", source=other.source) == other


def with_a_threshold(env, seed, threshold):
    return BNP(env, threshold)


def test_what_was_learned_serves_all_budgets_and_counts_in_each(files, tmp_path, monkeypatch):
    made = []

    def learn(self, defender):
        made.append(self.seed)
        time.sleep(0.5)
        return np.arange(len(defender.neurons), dtype=np.float64)

    monkeypatch.setattr("backdoor_gym.baselines.anp.ANP.learn", learn)
    done = backdoor_gym.benchmark(files[:1], ["anp"], [OWN, 0.01, 0.05], seeds=2, out=tmp_path, jobs=1)
    assert not done.failed
    assert sorted(made) == [0, 1]
    assert all(result.seconds > 0.5 for result in done.results)
    changed = backdoor_gym.benchmark(files[1:], ["anp"], [0.01], out=tmp_path, jobs=1)
    assert not changed.failed
    assert len(made) == 3  # of another network it is learned anew


def test_factories_with_arguments_are_told_apart(files, tmp_path):
    policies = {f"at {u}": partial(with_a_threshold, threshold=u) for u in (1.5, 2.5)}
    done = backdoor_gym.benchmark(files[:1], policies, [0.05], out=tmp_path, jobs=2)
    assert not done.failed
    assert [result.source.partition(" ")[2].partition(" ")[0] for result in done.results] == [
        "threshold=1.5",
        "threshold=2.5",
    ]
    again = backdoor_gym.benchmark(files[:1], policies, [0.05], out=tmp_path, jobs=1)
    assert again.results == done.results


def test_policies_that_read_no_derivatives_are_spared_them(infected, monkeypatch):
    taken = []
    slopes = MaskedVictim.slopes
    monkeypatch.setattr(MaskedVictim, "slopes", lambda self, pruned: (taken.append(1), slopes(self, pruned))[1])
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None, max_steps=9).unwrapped
    pruned = []
    for reads in (True, False):
        policy = BNP(env, -100.0)
        policy.reads_derivatives = reads
        run_episode(policy, env, env.reset(seed=0)[0])
        pruned.append(env.session.state.changes)
        assert len(taken) == 2
    assert pruned[0] == pruned[1]
    assert env.slopes_every == 4


def test_a_failure_is_told_stops_nothing_and_is_tried_again(files, tmp_path):
    policies = {"broken": broken, "clp": "clp"}
    done = backdoor_gym.benchmark(files[:1], policies, [0.02], out=tmp_path, jobs=1)
    assert [result.policy for result in done.failed] == ["broken"]
    assert "it never worked" in done.failed[0].error
    assert "it never worked" in done.table
    assert done.results[1].acc is not None
    done = backdoor_gym.benchmark(files[:1], {"broken": mine, "clp": "clp"}, [0.02], out=tmp_path, jobs=1)
    assert not done.failed


def test_a_killed_run_loses_no_finished_cell(files, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "backdoor_gym.cli", "benchmark", "--infected", ",".join(files), "--policies",
        "clp,bnp,ep,magnitude,random", "--budgets", "0.01,0.02,0.05", "--jobs", "1", "--out", str(out),
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    cells = out / "cells.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not cells.is_file() or cells.read_text().count("\n") < 3):
        time.sleep(0.05)
    running.kill()
    running.wait()
    kept = CellFile(cells).read_all()
    assert 3 <= len(kept) < 30
    subprocess.run(command, check=True, capture_output=True)
    finished = CellFile(cells).read_all()
    assert finished[: len(kept)] == kept
    assert len(finished) == len({result.cell for result in finished}) == 30


def test_a_cell_is_run_again_when_its_model_or_its_policy_is_another(files, infected, plain_infected, tmp_path):
    def run(**policies):
        return backdoor_gym.benchmark(files[:1], policies, [0.02], out=tmp_path / "out", jobs=1).results[0]

    first = run(mine="clp")
    other = run(mine="bnp")
    assert (other.pruned, other.asr) != (first.pruned, first.asr)
    plain_infected.save(files[0])
    again = run(mine="bnp")
    assert again.attack == "blended"
    assert run(mine="bnp") == again


def test_processes_end_with_the_one_that_began_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from backdoor_gym.processes import one_core_each\n"
        "if __name__ == '__main__':\n"
        "    pool = one_core_each(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    running = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    worker = int(running.stdout.readline())
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _lives(worker):
        time.sleep(0.1)
    assert not _lives(worker)


def _lives(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # what nobody waited for is no longer at work
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] != "Z"


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


def test_what_cannot_be_run_is_refused_before_the_work(files, tmp_path):
    for arguments, words in (
        ({"policies": ["clpp"]}, "did you mean 'clp'"),
        ({"policies": ["onp:auto"]}, "takes no threshold"),
        ({"policies": ["clp:high"]}, "a threshold must be"),
        ({"policies": ["no.module:thing"]}, "cannot be imported"),
        ({"policies": ["json:__name__"]}, "no function"),
        ({"policies": ["bnp:budget"]}, "leave that budget out"),
        ({"policies": {"mine": lambda env, seed: None}, "jobs": 2}, "jobs=1"),
        ({"policies": []}, "no policy"),
        ({"budgets": [2.0]}, "share from 0 to 1"),
        ({"budgets": []}, "one budget"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1"),
        ({"residual": "groups"}, "residual mode"),
        ({"device": "cpux"}, "device"),
    ):
        with pytest.raises((DataError, UnknownNameError), match=words):
            backdoor_gym.benchmark(files, **{"policies": ["clp"], **arguments}, out=tmp_path / "out")
    assert not (tmp_path / "out" / "cells.jsonl").exists()
    (tmp_path / "cells.jsonl").write_text("something else\n")
    with pytest.raises(DataError, match="not a result"):
        backdoor_gym.benchmark(files, ["clp"], out=tmp_path)


def test_the_command_prints_the_table_and_json(run, files, tmp_path):
    arguments = (
        "benchmark",
        "--infected",
        files[0],
        "--policies",
        "clp,bnp:auto",
        "--budgets",
        "own,0.02",
        "--jobs",
        "1",
    )
    code, out, _ = run(*arguments, "--out", "result")
    assert code == 0
    assert "| bnp:auto | 1 | 1 |" in out
    assert "As published" in out
    code, out, _ = run(*arguments, "--out", "result", "--json")
    assert code == 0
    assert len(json.loads(out)) == 4
    code, _, err = run(*arguments, "--out", "result", "--budgets", "two")
    assert code == 2
    assert "--budgets" in err


def test_published_thresholds_are_those_of_own_cells(infected):
    trained = ("onp", "onp:look_ahead=false", "onp:finetune=0", "onp:finetune=8")  # the last goes on learning
    seeded = {
        cell.policy
        for cell in all_cells(["m"], {"anp": "anp", "mine": mine, **{one: one for one in trained}}, [0.02], 2, {})
        if cell.seed
    }
    assert seeded == {"anp", "mine", "onp:finetune=8"}
    assert own_budget("bnp") is None
    assert own_budget("magnitude") == own_budget(mine) == 0.02
    assert own_budget("onp") == 0.01
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=0.02).unwrapped
    assert make("bnp", env, OWN, 0).threshold == BNP.published
    assert make("bnp", env, 0.02, 0).threshold == "budget"
    assert make("bnp:auto", env, 0.02, 0).threshold == "auto"
    assert make("bnp:2.5", env, 0.02, 0).threshold == 2.5


def test_specifications_have_the_options_of_repair(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=0.02).unwrapped
    anp = make("anp:steps=50", env, 0.02, 3)
    assert (anp.steps, anp.threshold, anp.seed) == (50, "budget", 3)
    anp = make("anp:0.9:steps=50", env, OWN, 0)
    assert (anp.steps, anp.threshold) == (50, 0.9)
    assert make("clp:u=1.5", env, OWN, 0).threshold == 1.5
    assert make("greedy:candidates=7", env, 0.02, 0).candidates == 7
    assert make("onp:look_ahead=false", env, 0.02, 0).look_ahead is None
    for wrong, words in (
        ("anp:steps=many", "numbers, true or false, not 'many'"),
        ("anp:steps=0", "steps must be a whole number of at least 1, not 0"),
        ("anp:seed=1", "those of the benchmark"),
        ("anp:epochs=3", "option of anp 'epochs'"),
        ("onp:look_ahead=3", "look_ahead must be True or False"),
        ("random:0.5", "random takes no threshold"),
    ):
        with pytest.raises((DataError, UnknownNameError), match=words):
            named([wrong], [0.02])


def result_of(**own):
    return replace(
        Result("a model", "clp", 0.02, 0, "clp", asdict(Conditions())),
        **{"acc": 0.5, "acc_before": 0.9, "der": 0.5, "pruned": 3, **own},
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
