"""Record episodes as videos with Gymnasium's own wrapper.

Gymnasium writes videos with MoviePy: pip install 'backdoor-gym[video]'.

Usage: python tutorials/record_video.py [FOLDER] [STEPS]; by default videos/ and 20 prunes.
"""

import sys

import gymnasium as gym
from gymnasium.wrappers import RecordVideo

import backdoor_gym  # noqa: F401 (registers the environment)
from backdoor_gym.baselines import CLP

folder, steps = [*sys.argv[1:], *("videos", "20")[len(sys.argv) - 1 :]]

env = gym.make("BackdoorPrune-v0", infected="digits-badnets", render_mode="rgb_array", max_steps=int(steps))
env = RecordVideo(env, folder, name_prefix="clp", episode_trigger=lambda episode: True, disable_logger=True)
policy = CLP(env, u=1.5)  # or a trained agent: whatever has predict
observation, info = env.reset(seed=0)
done = False
while not done:
    action, _ = policy.predict(observation, deterministic=True)
    observation, reward, terminated, truncated, info = env.step(action)
    done = terminated or truncated
env.close()  # the video is written now
print(f"{folder}: {info['pruned']} neurons pruned, accuracy {info['acc']:.3f}, ASR {info['asr']:.3f}")
