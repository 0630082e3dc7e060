import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

from backdoor_gym.envs.viewer import HEIGHT, WIDTH


def make(infected, mode):
    env = gym.make("BackdoorPrune-v0", infected=infected, render_mode=mode, accuracy_budget=None)
    env.reset(seed=0)
    return env


def test_frames_have_one_size_and_show_a_prune(infected, plain_infected):
    env = make(infected, "rgb_array")
    before = env.render()
    assert before.shape == (HEIGHT, WIDTH, 3)
    assert before.dtype == np.uint8
    assert np.array_equal(before, env.render())
    env.step(5)
    assert not np.array_equal(before, env.render())
    assert make(plain_infected, "rgb_array").render().shape == before.shape


def test_text_has_a_line_for_each_layer_and_marks_what_is_pruned(infected):
    env = make(infected, "ansi")
    env.step(5)
    lines = env.render().splitlines()
    assert lines[0] == "tiny: 1 of 112 neurons pruned"
    assert lines[1].startswith("ACC ")
    assert "ASR" in lines[1]
    assert len(lines) == 2 + 7
    assert lines[2].split()[0] == "stem.0"
    assert lines[2].split()[-1].index("X") == 5


def test_human_mode_does_not_hang_without_a_screen(infected_file):
    code = (
        "import gymnasium as gym, backdoor_gym\n"
        f"env = gym.make('BackdoorPrune-v0', infected={str(infected_file)!r}, render_mode='human')\n"
        "env.reset(seed=0); env.step(3); print(env.render()); env.close()"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "MPLCONFIGDIR": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"
    assert "needs a screen" in done.stderr


def test_rendering_needs_a_mode(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected).unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
