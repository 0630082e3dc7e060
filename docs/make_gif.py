"""Make the moving picture of a repair: ONP prunes the backdoor out of an embedded network.

Usage: python docs/make_gif.py [MODEL] [FILE]; by default digits-badnets and docs/pictures/repair.gif.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from PIL import Image

import backdoor_gym  # noqa: F401 (registers the environment)
from backdoor_gym.agents import ONP
from backdoor_gym.session.session import MOST_FAILURES

MODEL, FILE = "digits-badnets", Path(__file__).parent / "pictures" / "repair.gif"
#: Milliseconds that the first frame, each prune and the last frame are shown.
FIRST, EACH, LAST = 1500, 350, 4000
COLOURS = 128


def frames_of(model: str) -> list[np.ndarray]:
    """A frame for the whole network, for each prune, and for what is left after the policy gave neurons back."""
    env = gym.make(
        "BackdoorPrune-v0",
        infected=model,
        accuracy_budget=0.01,
        guard="held-out",
        max_failures=MOST_FAILURES,
        render_mode="rgb_array",
    )
    onp = ONP.load("pretrained", env)
    observation, _ = env.reset(seed=0)
    frames, done = [env.render()], False
    while not done:
        action, _ = onp.predict(observation, deterministic=True)
        observation, _, terminated, truncated, info = env.step(action)
        if info["neuron"]:  # none where the prune was undone
            frames.append(env.render())
        done = terminated or truncated
    onp.finish(env.unwrapped)
    frames.append(env.render())
    env.close()
    return frames


def save(frames: list[np.ndarray], file: Path) -> None:
    """As a GIF that repeats; all frames have the colours of the last one."""
    palette = Image.fromarray(frames[-1]).quantize(COLOURS, Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [FIRST, *[EACH] * (len(images) - 2), LAST]
    images[0].save(file, save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)


if __name__ == "__main__":
    model, file = [*sys.argv[1:], *(MODEL, FILE)[len(sys.argv) - 1 :]]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save(frames_of(model), Path(file))
    print(f"{file}: {Path(file).stat().st_size / 1000:.0f} kB")
