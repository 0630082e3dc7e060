"""Mutated files are read right or refused; ``benchmarks/fuzz.py`` has what is mutated, and runs many more."""

import importlib
import random
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
fuzz = importlib.import_module("fuzz")
sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return fuzz.Originals(tmp_path_factory.mktemp("fuzzed"))


@pytest.mark.parametrize("kind", sorted(fuzz.KINDS))
def test_originals_are_read(originals, kind):
    name, _, read, _ = fuzz.KINDS[kind]
    read(originals.folder / "originals" / name)


@pytest.mark.parametrize("kind", sorted(fuzz.KINDS))
@settings(max_examples=30, deadline=10_000, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(draw=st.randoms(use_true_random=False))
def test_mutated_files_are_read_right_or_refused(originals, kind, draw):
    assert fuzz.check(originals, kind, draw) in ("read", "refused", "same")


def test_the_check_sees_damage_that_a_reader_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("backdoor_gym.files.tensors._checksum", lambda *_: "always the same")
    originals = fuzz.Originals(tmp_path)

    def damage(path, draw):
        path.write_bytes(path.read_bytes().replace(b"digits-val/0", b"digits-val/1"))

    monkeypatch.setattr(fuzz, "mutate_bytes", damage)
    draw = random.Random(0)
    monkeypatch.setattr(draw, "random", lambda: 0.9)
    with pytest.raises(AssertionError, match="nobody noticed"):
        fuzz.check(originals, "policy", draw)
