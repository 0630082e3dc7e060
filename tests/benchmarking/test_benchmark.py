import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import backdoor_gym
from backdoor_gym.baselines import BNP, RandomPolicy
from backdoor_gym.benchmarking import OWN
from backdoor_gym.benchmarking.cells import CellFile, all_cells
from backdoor_gym.benchmarking.figures import der_by_attack
from backdoor_gym.benchmarking.specifications import make, named, own_budget
from backdoor_gym.errors import DataError, UnknownNameError
from backdoor_gym.policies.contract import run_episode
from backdoor_gym.session.masked_model import MaskedModel


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
    if env.session.prepared.model.facts["attack"] == "badnets":
        os.kill(os.getpid(), signal.SIGSEGV)
    return RandomPolicy(seed)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_of_it(files, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import backdoor_gym\nbackdoor_gym.benchmark({files!r}, ['clp'], [0.05], out='out', jobs=2)\n")
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "DataError" in ended.stderr.splitlines()[-1]
    assert "__main__" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
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


@pytest.mark.slow
def test_models_of_ones_own_are_run_under_their_names(infected, files, tmp_path):
    own = replace(infected, name="mine")
    done = backdoor_gym.benchmark([own, files[0]], ["clp:1.5"], [OWN], out=tmp_path / "out", jobs=1)
    mine, saved = done.results
    assert (mine.model, saved.model) == ("mine", files[0])
    assert (mine.acc, mine.asr, mine.pruned) == (saved.acc, saved.asr, saved.pruned)
    with pytest.raises(DataError, match="names that differ"):
        backdoor_gym.benchmark([own, own], ["clp"], [OWN], out=tmp_path / "out", jobs=1)


@pytest.mark.slow
def test_a_model_of_ones_own_with_other_weights_is_another_cell(infected, plain_infected, tmp_path):
    for model in (infected, plain_infected):
        done = backdoor_gym.benchmark(replace(model, name="mine"), ["clp:1.5"], [OWN], out=tmp_path / "out", jobs=1)
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 2
    assert len(done.results) == 1


@pytest.mark.slow
def test_figures_call_files_of_policies_by_their_names(files, tmp_path):
    (one,) = backdoor_gym.benchmark(files[:1], ["random"], [0.02], out=tmp_path / "out", jobs=1).results
    names = ["bnp", "a/mine.safetensors", "a/same.safetensors", "b/same.safetensors"]
    figure = der_by_attack([replace(one, policy=name) for name in names])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["bnp", "mine", "a/same.safetensors", "b/same.safetensors"]


@pytest.mark.slow
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


def with_a_threshold(env, seed, threshold):
    return BNP(env, threshold)


@pytest.mark.slow
def test_processes_give_the_same_and_users_policies_are_rows(infected, files, tmp_path):
    policies = {
        "mine": mine,
        "imported": f"{__name__}:mine",
        "bnp": "bnp",
        "at": partial(with_a_threshold, threshold=1.5),
    }
    models = [*files, replace(infected, name="mine")]
    results = [
        backdoor_gym.benchmark(models, policies, [0.05], seeds=2, out=tmp_path / str(jobs), jobs=jobs).results
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


@pytest.mark.slow
def test_what_was_learned_serves_all_budgets_and_counts_in_each(files, tmp_path, monkeypatch):
    made = []

    def learn(self, defender):
        made.append(self.seed)
        time.sleep(0.5)
        return torch.arange(len(defender.neurons)) / len(defender.neurons)

    monkeypatch.setattr("backdoor_gym.baselines.anp.ANP.learn", learn)
    done = backdoor_gym.benchmark(files[:1], ["anp"], [OWN, 0.01, 0.05], seeds=2, out=tmp_path, jobs=1)
    assert not done.failed
    assert sorted(made) == [0, 1]
    assert all(result.seconds > 0.5 for result in done.results)
    changed = backdoor_gym.benchmark(files[1:], ["anp"], [0.01], out=tmp_path, jobs=1)
    assert not changed.failed
    assert len(made) == 3  # of another network it is learned anew


@pytest.mark.slow
def test_factories_with_arguments_are_told_apart(files, tmp_path):
    policies = {f"at {u}": partial(with_a_threshold, threshold=u) for u in (1.5, 2.5)}
    done = backdoor_gym.benchmark(files[:1], policies, [0.05], out=tmp_path, jobs=1)
    assert not done.failed
    assert [result.source.partition(" ")[2].partition(" ")[0] for result in done.results] == [
        "threshold=1.5",
        "threshold=2.5",
    ]
    again = backdoor_gym.benchmark(files[:1], policies, [0.05], out=tmp_path, jobs=1)
    assert again.results == done.results


def test_policies_that_read_no_derivatives_are_spared_them(infected, monkeypatch):
    taken = []
    gradients = MaskedModel.gradients
    monkeypatch.setattr(MaskedModel, "gradients", lambda self, pruned: (taken.append(1), gradients(self, pruned))[1])
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None, max_steps=9).unwrapped
    pruned = []
    for reads in (True, False):
        policy = BNP(env, -100.0)
        policy.reads_derivatives = reads
        run_episode(policy, env, env.reset(seed=0)[0])
        pruned.append(env.session.state.changes)
        assert len(taken) == 2
    assert pruned[0] == pruned[1]
    assert env.gradients_every == 4


@pytest.mark.slow
def test_a_failure_is_told_stops_nothing_and_is_tried_again(files, tmp_path):
    policies = {"broken": broken, "clp": "clp"}
    done = backdoor_gym.benchmark(files[:1], policies, [0.02], out=tmp_path, jobs=1)
    assert [result.policy for result in done.failed] == ["broken"]
    assert "it never worked" in done.failed[0].error
    assert "it never worked" in done.table
    expected = backdoor_gym.repair(files[0], "clp", 0.02, max_steps=100, u="budget")
    assert (done.results[1].acc, done.results[1].pruned) == (expected.after.acc, len(expected.pruned))
    done = backdoor_gym.benchmark(files[:1], {"broken": mine, "clp": "clp"}, [0.02], out=tmp_path, jobs=1)
    assert not done.failed


@pytest.mark.slow
def test_a_killed_run_loses_no_finished_cell(files, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "backdoor_gym.cli", "benchmark", "--infected", ",".join(files), "--policies",
        "clp,bnp,random", "--budgets", "0.01,0.02,0.05", "--jobs", "1", "--out", str(out),
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    cells = out / "cells.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not cells.is_file() or cells.read_text().count("\n") < 3):
        time.sleep(0.05)
    running.kill()
    running.wait()
    kept = CellFile(cells).read_all()
    assert 3 <= len(kept) < 18
    subprocess.run(command, check=True, capture_output=True)
    finished = CellFile(cells).read_all()
    assert finished[: len(kept)] == kept
    assert len(finished) == len({result.cell for result in finished}) == 18


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
