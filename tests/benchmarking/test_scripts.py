"""What the benchmarks import is there: they are run by hand, long after a name has moved."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_of_the_benchmarks_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    assert importlib.import_module(script.stem).__doc__
