"""Stable-Baselines3's algorithms take the environment unchanged, and can learn in it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_maskable
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from backdoor_gym.baselines import RandomPolicy


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(infected, **arguments):
    return gym.make("BackdoorPrune-v0", infected=infected, max_steps=12, score_samples=0, clean_samples=50, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (PPO, {"n_steps": 32, "batch_size": 32}),
        (DQN, {"learning_starts": 16, "buffer_size": 200, "batch_size": 16}),
        (MaskablePPO, {"n_steps": 32, "batch_size": 32}),
    ],
)
def test_algorithms_train_unchanged_on_several_models(algorithm, options, infected, plain_infected, tmp_path):
    env = make([infected, plain_infected])
    model = algorithm("MultiInputPolicy", env, seed=0, **options).learn(64)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=env)
    observation, _ = env.reset(seed=0)
    first, _ = model.predict(observation, deterministic=True)
    second, _ = again.predict(observation, deterministic=True)
    assert first == second
    assert env.action_space.contains(np.int64(first))


@pytest.mark.slow
def test_masks_reach_maskable_ppo_through_subprocesses(infected_file):
    env = SubprocVecEnv([lambda: make(str(infected_file))] * 2)
    env.reset()
    masks = np.stack(env.env_method("action_masks"))
    assert masks.shape == (2, 113)
    assert masks.dtype == bool
    MaskablePPO("MultiInputPolicy", env, n_steps=16, batch_size=16, seed=0).learn(32)
    env.close()


@pytest.mark.slow
def test_maskable_ppo_learns_a_known_answer(infected):
    """Pruning one neuron earns 1 and every other prune costs a little: the policy must find it and stop."""

    def reward(transition):
        return 1.0 if transition.unit == 7 else -0.05

    def env():
        return make(infected, reward=reward, accuracy_budget=None)

    model = MaskablePPO(
        "MultiInputPolicy",
        DummyVecEnv([env] * 2),
        n_steps=128,
        batch_size=128,
        n_epochs=10,
        learning_rate=3e-3,
        gamma=0.9,
        seed=0,
    ).learn(3_000)
    learned, _ = evaluate_maskable(model, env(), 10, deterministic=True, warn=False)
    random, _ = evaluate_policy(RandomPolicy(0), env(), 10, warn=False)
    assert learned > 0.8
    assert random < 0.3
