"""Every command where nothing, or not enough, can be written."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import backdoor_gym
from backdoor_gym.benchmarking import OWN
from backdoor_gym.errors import WriteError
from backdoor_gym.files.tensors import read_tensors
from backdoor_gym.models import digits_family, family
from backdoor_gym.models.infected import InfectedModel

TRAIN = (
    "train", "--infected", "digits-badnets", "--validate", "digits-clean", "--steps", 8, "--envs", 1, "--warm-epochs", 0,
    "--out", "old/p.safetensors", "--force",
)  # fmt: skip
BENCHMARK = (
    "benchmark", "--infected", "digits-badnets", "--policies", "random", "--budgets", "0.02,own", "--jobs", 1, "--max-steps", 2,
    "--out", "old",
)  # fmt: skip
#: A command, the bytes that a file may have at most, and an old file of its.
COMMANDS = {
    "repair, its network": (("repair", "--policy", "clp", "--out", "old"), 20_000, "repaired.safetensors"),
    "repair, its page": (("repair", "--policy", "clp", "--out", "old"), 120_000, "report.html"),
    "infect": (
        ("infect", "--epochs", 1, "--width", 16, "--out", "old/m.safetensors", "--force"),
        10_000,
        "m.safetensors",
    ),
    "train": (TRAIN, 60_000, "p.safetensors"),
    "benchmark, its cells": (BENCHMARK, 600, "table.md"),
    "benchmark, its pictures": (BENCHMARK, 8_000, "acc_asr.png"),
}


@contextmanager
def full_disk(most):
    """No file can grow beyond so many bytes; processes that are begun meanwhile inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def old(tmp_path):
    """A folder with a file that is to be there afterwards, too."""
    (tmp_path / "old").mkdir()
    return tmp_path / "old"


def listing(folder):
    """What there is, apart from locks, which are empty and stay."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMMANDS)
def test_a_full_disk_is_one_line_and_the_old_files_stay(run, old, what):
    arguments, most, name = COMMANDS[what]
    (old / name).write_text("old", encoding="utf-8")
    with full_disk(most):
        code, out, err = run(*arguments, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("error: old")
    assert err.endswith("cannot be written: File too large\n")
    assert len(err.splitlines()) == 1
    assert (old / name).read_text(encoding="utf-8") == "old"
    assert listing(old) - {"cells.jsonl"} == {name}


def test_infect_finds_out_before_it_trains(run, old, monkeypatch):
    monkeypatch.setattr("backdoor_gym.models.training._save", lambda *_: pytest.fail("it trained an epoch"))
    with full_disk(10_000):
        code, _, err = run("infect", "--epochs", 1, "--width", 16, "--out", "old/m.safetensors", "--quiet")
    assert code == 2
    assert "File too large" in err


@pytest.mark.slow
@pytest.mark.parametrize("out", ["new", "new/er"])
def test_work_that_fails_leaves_no_empty_folder(run, tmp_path, out):
    with full_disk(20_000):
        code, _, err = run("repair", "--policy", "clp", "--out", out, "--quiet")
    assert (code, "File too large" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_cache_is_one_line_and_stops_the_building(run, tmp_path, monkeypatch):
    monkeypatch.setenv(family.CACHE_VARIABLE, str(tmp_path / "cache"))
    sizes = {seed: digits_family.recipe("digits-train", seed) for seed in range(100)}
    path = family.cache_path(f"digits-train/{min(sizes, key=lambda seed: sizes[seed].width * sizes[seed].blocks)}")
    with full_disk(10_000):
        code, out, err = run("zoo", "build", f"digits-train/{int(path.stem)}", "--jobs", 1, "--quiet")
    assert (code, out) == (2, "")
    assert err == f"error: {path} cannot be written: File too large\n"
    assert listing(tmp_path / "cache") == {path.parent.name}


def test_a_cell_whose_model_cannot_be_cached_stops_the_benchmark(infected, tmp_path, monkeypatch):
    monkeypatch.setenv(family.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(family, "make", lambda name, progress: infected)
    with full_disk(10_000), pytest.raises(WriteError, match="000003"):
        backdoor_gym.benchmark("digits-train/3", ["random"], [0.02], jobs=1, out=tmp_path / "out", max_steps=2)


@pytest.mark.slow
def test_finished_cells_outlive_a_full_disk(infected, tmp_path):
    options = {"jobs": 1, "max_steps": 2, "out": tmp_path / "out"}
    policies = ["random", "magnitude"]
    backdoor_gym.benchmark(infected, ["random"], [0.02], **options)
    cells = tmp_path / "out" / "cells.jsonl"
    finished = cells.read_bytes()
    with full_disk(len(finished) + 100), pytest.raises(WriteError, match=r"cells\.jsonl"):
        backdoor_gym.benchmark(infected, policies, [0.02], **options)
    assert cells.read_bytes() == finished
    done = backdoor_gym.benchmark(infected, policies, [0.02, OWN], **options)
    assert not done.failed
    assert cells.read_bytes().startswith(finished)


@pytest.fixture(scope="module")
def repaired(infected):
    return backdoor_gym.repair(infected, "magnitude")


@pytest.mark.slow
def test_where_one_file_of_a_repair_cannot_be_written_all_old_ones_stay(repaired, tmp_path):
    written = repaired.save(tmp_path)
    assert [path.name for path in written] == ["repaired.safetensors", "pruned.json", "repair.png", "report.html"]
    before = {path: path.read_bytes() for path in written}
    for path in written:
        path.write_bytes(b"older")
    for most in sorted(len(content) for content in before.values()):
        with full_disk(most - 1), pytest.raises(WriteError, match=f"{tmp_path} cannot be written: File too large"):
            repaired.save(tmp_path)
        assert {path.read_bytes() for path in written} == {b"older"}
        assert len(listing(tmp_path)) == len(written)
    repaired.save(tmp_path)
    InfectedModel.load(written[0])
    json.loads(written[1].read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written[3].read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_what_is_no_file_is_noticed_before_the_work(run, old, monkeypatch):
    def work(*_, **__):
        pytest.fail("the work began")

    for name in ("report.html", "cells.csv", "m.safetensors", "p.safetensors", "q.safetensors.checkpoint"):
        os.mkfifo(old / name)
    for place in ("repairing.repair", "models.infecting.infect", "agents.training.train", "benchmarking.benchmark"):
        monkeypatch.setattr(f"backdoor_gym.{place}", work)
    other = ("infect", "--out", "old/q.safetensors")
    for arguments, name in (
        (("repair", "--out", "old"), "report.html"),
        (BENCHMARK, "cells.csv"),
        (COMMANDS["infect"][0], "m.safetensors"),
        (TRAIN, "p.safetensors"),
        (other, "q.safetensors.checkpoint"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err == f"error: old/{name} cannot be written: it is a named pipe, and only regular files are replaced\n"


#: Standard output has an encoding and an end only in a process of its own.
START = "from backdoor_gym.cli import main; main()"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STRICT = "import warnings; warnings.filterwarnings('error', category=EncodingWarning, module='backdoor_gym'); "


def start(*arguments, flags=(), before="", **more):
    command = [sys.executable, *flags, "-c", f"{before}{START}", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("--help",)])
def test_standard_output_that_is_full_is_one_line(arguments):
    with Path("/dev/full").open("wb") as full:
        done = start(*arguments, stdout=full)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("list", "digits-test/*"), ("list", "--json"), ("--help",)])
def test_a_reader_who_goes_away_is_told_nothing(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = start(*arguments, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_an_ascii_locale_changes_no_file(tmp_path):
    arguments = (
        "benchmark", "--infected", "digits-badnets,digits-clean", "--policies", "random", "--budgets", "0.02", "--jobs", 1,
        "--max-steps", 1, "--test-samples", 20, "--out", "grün",
    )  # fmt: skip
    done = start(
        *arguments, flags=("-X", "warn_default_encoding"), before=STRICT, stdout=subprocess.PIPE, cwd=tmp_path,
        env={**os.environ, **ASCII},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\xb1" in done.stdout
    folder = next(path for path in tmp_path.iterdir() if path.name.startswith("gr"))
    assert "±" in (folder / "table.md").read_text(encoding="utf-8")


def test_a_name_that_the_locale_cannot_write_is_one_line(tmp_path):
    code = "from pathlib import Path; from backdoor_gym.writing import write_text; write_text(Path('x\\xfc'), '')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **ASCII}
    )
    last = done.stderr.splitlines()[-1]
    assert last == (
        "backdoor_gym.errors.WriteError: x\\xfc cannot be written: the locale has no such characters for names of files"
    )


def test_an_interrupted_infection_whose_file_is_there_ends(run, tmp_path):
    arguments = ("infect", "--epochs", 1, "--width", 8, "--out", "m.safetensors")
    assert run(*arguments)[0] == 0
    whole = read_tensors(tmp_path / "m.safetensors")[1]
    # Killed after the model was written and before the checkpoint was removed.
    keep = Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **options: path.suffix == ".checkpoint" or keep(path, **options))
        assert run(*arguments, "--force")[0] == 0
    assert (tmp_path / "m.safetensors.checkpoint").exists()
    assert run(*arguments)[0] == 0
    assert not (tmp_path / "m.safetensors.checkpoint").exists()
    assert read_tensors(tmp_path / "m.safetensors")[1] == whole
    assert run(*arguments)[0] == 2
