"""Each tutorial runs from its first line to its last, with short settings."""

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"


@pytest.fixture
def run_tutorial(monkeypatch, capsys, tmp_path):
    """Runs a script as ``python tutorials/NAME`` does, in an empty folder; what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_an_agent_of_your_own(run_tutorial, tmp_path):
    said = run_tutorial("own_agent.py", "--short")
    assert [line.split()[0] for line in said.splitlines()] == ["policy", "mine", "random"]
    assert (tmp_path / "own_agent.zip").is_file()


@pytest.mark.slow
def test_a_policy_of_your_own(run_tutorial):
    said = run_tutorial("own_policy.py", "--short")
    for name in ("variance gap", "pull against harm", "bnp"):
        assert f"| {name} | 1 | 1 |" in said


@pytest.mark.slow
def test_a_checkpoint_of_your_own(run_tutorial, tmp_path):
    said = run_tutorial("own_checkpoint.py")
    before, after = (float(re.search(rf"^{when} +ACC .* ASR ([\d.]+)", said, re.M)[1]) for when in ("before", "after"))
    assert before > 0.9
    assert after < before
    assert (tmp_path / "repaired.safetensors").is_file()


@pytest.mark.slow
def test_agents_of_layers(run_tutorial):
    said = run_tutorial("agents_of_layers.py", "--short")
    by_hand = re.search(r"by hand +return +([\d.]+)", said)
    assert float(by_hand[1]) == pytest.approx(0.368, abs=0.01)
    assert re.search(r"^learned +return +-?[\d.]+  pruned", said, re.MULTILINE)


def test_a_cluster(run_tutorial, tmp_path):
    pytest.importorskip("ray.rllib")
    said = run_tutorial("cluster.py", "--short")
    assert "digits-badnets: pruned" in said
    assert (tmp_path / "cluster.safetensors").is_file()


def test_the_index_names_each_of_them():
    index = (FOLDER / "README.md").read_text()
    assert {path.name for path in FOLDER.glob("*.py")} == set(re.findall(r"\]\((\w+\.py)\)", index))
