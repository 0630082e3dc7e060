"""The threads of Stable-Baselines3's vector environment change nothing but the time."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from sb3_contrib import MaskablePPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from backdoor_gym.agents.vec_env import ThreadedVecEnv
from backdoor_gym.envs import prefetch as ahead
from backdoor_gym.envs.prune import BackdoorPruneEnv

pytestmark = pytest.mark.usefixtures("two_threads")


def steps_of(env, count):
    env.seed(0)
    random = np.random.default_rng(0)
    returned = [env.reset()]
    for _ in range(count):
        masks = np.stack(env.env_method("action_masks"))
        actions = np.array([random.choice(np.flatnonzero(mask)) for mask in masks])
        observations, rewards, dones, infos = env.step(actions)
        for info in infos:
            info.get("episode", {}).pop("t", None)  # seconds
        returned.append((observations, rewards, dones, infos))
    return returned


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", [True, False])
def test_equal_to_dummy_vec_env(infected_file, plain_infected_file, side_by_side, monkeypatch):
    monkeypatch.setattr(ahead, "SIDE_BY_SIDE_BYTES", 1 << 40 if side_by_side else -1)

    def make():
        return Monitor(BackdoorPruneEnv(infected=[str(infected_file), str(plain_infected_file)], max_steps=5))

    one, other = DummyVecEnv([make] * 3), ThreadedVecEnv([make] * 3)
    expected, found = steps_of(one, 12), steps_of(other, 12)
    assert data_equivalence(found, expected, exact=True)
    assert any("terminal_observation" in info for _, _, _, infos in found[1:] for info in infos)
    assert all(other.env_is_wrapped(Monitor))
    other.close()


@pytest.mark.slow
def test_maskable_ppo_learns_in_it(infected_file):
    env = ThreadedVecEnv([lambda: Monitor(BackdoorPruneEnv(infected=str(infected_file), max_steps=5))] * 2)
    learner = MaskablePPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0)
    learner.learn(32)
    assert learner.num_timesteps == 32
    env.close()
