"""How many files of the project one step goes through, as docs/design.md tells it."""

import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import backdoor_gym

PACKAGE = Path(backdoor_gym.__file__).parent
#: What lies below the network under a mask is asked through it alone.
NETWORK = "masking/masked.py"
SECTION = (PACKAGE.parent / "docs/design.md").read_text().split("## One step\n")[1].split("\n## ")[0]


def path_of(frame) -> str | None:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def entered_by(function, *arguments) -> tuple[set[str], set[str]]:
    """The files of the package that a call enters: down to the network under a mask, and below it."""
    above, below = set(), set()

    def hook(frame, event, _):
        if event != "call" or (path := path_of(frame)) is None:
            return
        while (frame := frame.f_back) is not None and path_of(frame) != NETWORK:
            pass
        (above if frame is None else below).add(path)

    sys.setprofile(hook)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return above, below - {NETWORK}


@pytest.fixture(scope="module")
def steps():
    """Of an episode: a prune, one after which derivatives are taken anew, and a stop."""
    env = gym.make("BackdoorPrune-v0")
    env.reset(seed=0)
    assert env.unwrapped.session.prepared.unit_names[5]  # made at the first prune, for all episodes
    entered = []
    for unit in (5, 9, 11, 20):
        entered.append(entered_by(env.step, unit))
    assert env.unwrapped.session.state.pruned.sum() == 4
    return {"prune": entered[0], "fourth prune": entered[3], "stop": entered_by(env.step, env.unwrapped.stop_action)}


@pytest.mark.parametrize("step", ["prune", "fourth prune", "stop"])
def test_a_step_enters_seven_files_and_the_network(steps, step):
    assert len(steps[step][0] - {NETWORK}) <= 7


def test_the_files_are_those_that_are_written_down(steps):
    tree, _, rest = SECTION.partition("Below the network")
    files = re.compile(r"\b(?:\w+/)?\w+\.py\b")
    above, below = steps["fourth prune"]
    assert sorted(files.findall(tree)) == sorted(above)
    assert sorted(files.findall(rest)) == sorted(below - above)
    assert steps["prune"][0] == above
    assert below - above - steps["prune"][1] == {"masking/backward.py"}
