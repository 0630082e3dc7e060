"""What all policies share: in which environment they act, and which actions are legal."""

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from backdoor_gym.agents import ONP, LookAhead
from backdoor_gym.baselines import BNP, CLP, GreedyACC, RandomPolicy
from backdoor_gym.errors import DataError

KINDS = {
    "rule": BNP,
    "rule with a threshold of its own": lambda env: CLP(env, "auto"),
    "greedy": GreedyACC,
    "look-ahead": lambda env: ONP(env, look_ahead=LookAhead(2), threshold=0.01, seed=0),
}


def make(model, **options):
    return gym.make("BackdoorPrune-v0", infected=model, score_samples=0, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_of_another_environment_is_refused_until_it_is_given_this_one(kind, infected, plain_infected):
    mine, other = make(plain_infected), make(infected)
    policy = KINDS[kind](mine)
    observation, _ = other.reset(seed=0)
    for _ in range(2):  # before the first episode of its own environment, and in it
        with pytest.raises(DataError, match=r"another environment.*set_env"):
            policy.predict(observation, deterministic=True)
        mine.reset(seed=0)
    policy.set_env(other)
    found, _ = policy.predict(observation, deterministic=True)
    assert found == KINDS[kind](other).predict(observation, deterministic=True)[0]


def test_nor_does_it_take_another_state_of_its_network_or_more_environments_than_it_has(infected):
    mine = make(infected, accuracy_budget=None)
    before, _ = mine.reset(seed=0)
    mine.step(3)
    with pytest.raises(DataError, match="set_env"):
        GreedyACC(mine).predict(before)
    several = DummyVecEnv([lambda: mine])
    batch = {key: np.concatenate([value, value]) for key, value in several.reset().items()}
    with pytest.raises(DataError, match="set_env"):
        BNP(several).predict(batch)


def test_what_was_learned_of_one_network_is_forgotten_with_its_environment(infected, plain_infected):
    one, two = make(infected, accuracy_budget=None), make(plain_infected, accuracy_budget=None)
    rule = BNP(one, 0.5)
    rule.predict(one.reset(seed=0)[0])
    observation, _ = two.reset(seed=0)
    observation, *_ = two.step(0)
    rule.set_env(two)
    assert rule.predict(observation)[0] == BNP(two, 0.5).predict(observation)[0]


@pytest.mark.parametrize("kind", [BNP, GreedyACC, lambda env: RandomPolicy(0)])
def test_legal_actions_may_be_handed_over(kind, infected):
    env = Monitor(make(infected, max_steps=6))
    observation, _ = env.reset(seed=0)
    first, _ = kind(env).predict(observation)
    masks = env.unwrapped.action_masks()
    masks[first] = False
    assert masks[kind(env).predict(observation, action_masks=masks)[0]]
    batch = {key: np.stack([value] * 2) for key, value in observation.items()}
    if kind is not GreedyACC and kind is not BNP:
        assert masks[kind(env).predict(batch, action_masks=np.stack([masks] * 2))[0]].all()
    evaluate_policy(kind(env), env, n_eval_episodes=1)
