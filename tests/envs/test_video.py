"""The pictures of repairs that move: Gymnasium's videos, and the GIF of the documentation."""

import runpy
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from backdoor_gym import repair
from backdoor_gym.rendering.drawing import HEIGHT, WIDTH

ROOT = Path(__file__).parents[2]


def test_a_video_is_recorded(tmp_path, monkeypatch):
    pytest.importorskip("moviepy", reason="the extra video is not installed")
    monkeypatch.setattr(sys, "argv", ["record_video.py", str(tmp_path), "3"])
    runpy.run_path(str(ROOT / "tutorials" / "record_video.py"), run_name="__main__")
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 10_000


def test_frames_are_collected_as_gymnasium_does(infected):
    """What RecordVideo reads, without MoviePy."""
    env = gym.wrappers.RenderCollection(gym.make("BackdoorPrune-v0", infected=infected, render_mode="rgb_array"))
    env.reset(seed=0)
    env.step(3)
    frames = env.render()
    assert [frame.shape for frame in frames] == [(HEIGHT, WIDTH, 3)] * 2


@pytest.mark.slow
def test_the_gif_shows_each_prune(infected_file, tmp_path, monkeypatch):
    script = runpy.run_path(str(ROOT / "docs" / "make_gif.py"))
    frames = script["frames_of"](str(infected_file))
    pruned = [change for change in repair(infected_file).course if not change.given_back]
    assert len(frames) == 2 + len(pruned)  # the whole network, and what was given back
    script["save"]([frames[0], frames[1], frames[-1]], tmp_path / "repair.gif")
    with Image.open(tmp_path / "repair.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (WIDTH, HEIGHT))
        gif.seek(2)
        difference = np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[-1])
        assert difference.mean() < 3
