"""The examples in docstrings run, word for word and each on its own, and every public entry point has one."""

import doctest
import importlib
import inspect
from pathlib import Path

import gymnasium as gym
import pytest

import backdoor_gym
from backdoor_gym import agents, baselines

ROOT = Path(__file__).parents[1]
NEEDING_RAY = ("backdoor_gym.on_ray.rllib",)
#: What gym.make and gym.make_vec call.
POINTS = [
    point
    for spec in gym.registry.values()
    for point in (spec.entry_point, spec.vector_entry_point)
    if str(spec.entry_point).startswith("backdoor_gym.")
]


def named(point: str):
    module, _, name = point.partition(":")
    return getattr(importlib.import_module(module), name)


PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (backdoor_gym, agents, baselines)
    for name in package.__all__
} | {point: named(point) for point in POINTS}


def modules() -> list[str]:
    """Of the package; agents and baselines lie beside it."""
    names = []
    for folder in ("backdoor_gym", "agents", "baselines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts if folder == "backdoor_gym" else ("backdoor_gym", *parts)))
    names = [name.removesuffix(".__init__") for name in names]
    return [name for name in names if not name.endswith(".__main__") and name not in NEEDING_RAY]


def examples() -> dict[str, doctest.DocTest]:
    """All of them, by the dotted name of what they are of."""
    find = doctest.DocTestFinder(exclude_empty=True)
    there = {}
    for name in modules():
        for example in find.find(importlib.import_module(name), globs={}):
            there[example.name] = example
    return there


EXAMPLES = examples()


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.examples])
def test_an_example_does_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    result = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(EXAMPLES[name], out=said.append)
    assert result.failed == 0, "".join(said)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    public = PUBLIC[name]
    home = public.__name__ if inspect.ismodule(public) else f"{public.__module__}.{public.__qualname__}"
    assert EXAMPLES[home].examples
