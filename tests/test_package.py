import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import backdoor_gym


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, backdoor_gym; print([name for name in ('torch', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.slow
def test_python_started_in_a_clone_finds_the_agents_and_the_baselines():
    code = (
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]; "
        "import backdoor_gym; from backdoor_gym.agents import ONP; from backdoor_gym.baselines import clp; "
        "import backdoor_gym.agents.onp as onp; print(onp.__file__)"
    )
    clone = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert run.stdout.strip() == str(clone / "agents" / "onp.py"), run.stderr


@pytest.mark.parametrize("name", backdoor_gym.__all__)
def test_public_names_are_there(name):
    assert getattr(backdoor_gym, name).__name__ == name
    assert name in dir(backdoor_gym)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        backdoor_gym.nothing_like_it  # noqa: B018


def test_the_wheel_has_every_folder_of_the_package():
    root = Path(__file__).parents[1]
    folders = {path.parent.relative_to(root).as_posix() for path in (root / "backdoor_gym").rglob("__init__.py")}
    named = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    beside = {"backdoor_gym.agents", "backdoor_gym.baselines"}
    assert set(named) == {folder.replace("/", ".") for folder in folders} | beside
