import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from backdoor_gym.baselines import RandomPolicy


def test_actions_are_legal_and_spread(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None, score_samples=0)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(4)
    policy = RandomPolicy(seed=0)
    actions = [int(policy.predict(observation)[0]) for _ in range(500)]
    assert 4 not in actions
    assert all(observation["action_mask"][action] for action in actions)
    assert len(set(actions)) > 80


def test_the_seed_decides(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0)
    rewards = [
        evaluate_policy(RandomPolicy(seed), env, 3, return_episode_rewards=True, warn=False)[0] for seed in (1, 1, 2)
    ]
    assert rewards[0] == rewards[1] != rewards[2]


def test_batches_get_an_action_each(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0)
    observation, _ = env.reset(seed=0)
    batch = {key: np.stack([value, value]) for key, value in observation.items()}
    actions, state = RandomPolicy(0).predict(batch, state=None, episode_start=np.array([True, True]))
    assert actions.shape == (2,)
    assert state is None
