"""``look_again``: an episode goes on under another inverted trigger."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from backdoor_gym.analysis.label_inversion import invert_label
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


@pytest.fixture(scope="module")
def other(infected):
    neurons = PreparedModel(infected, Preparation()).neurons
    return invert_label(neurons, infected.clean.images, infected.clean.labels, infected.target + 1, seed=5)[0]


@pytest.fixture
def env(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, max_steps=3, gradients_every=1)
    env.reset(seed=0)
    return env


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_it_goes_on_after_a_stop(env, other):
    env.step(3)
    before = env.step(env.stop_action)[0]
    with pytest.raises(gym.error.ResetNeeded, match="over"):
        env.step(4)
    observation = env.look_again(other)
    assert env.observation_space.contains(observation)
    same(observation, env.observe())
    assert env.gave(observation)
    assert not np.array_equal(observation["globals"], before["globals"])
    _, _, terminated, _, info = env.step(4)
    assert (info["pruned"], terminated) == (2, False)
    assert np.flatnonzero(env.session.state.pruned).tolist() == [3, 4]
    assert env.session.prepared.inverted is other


def test_the_steps_that_were_taken_count(env, other):
    for unit in (3, 4):
        env.step(unit)
    env.look_again(other)
    *_, terminated, truncated, _ = env.step(5)
    assert (terminated, truncated) == (False, True)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_have_the_trigger(env, other, twin_of, over):
    env.step(3)
    env.look_again(other)
    env.step(40)
    if over:
        env.step(env.stop_action)
    twin = twin_of(env)
    assert torch.equal(twin.session.prepared.inverted.images, other.images)
    assert twin.session.prepared.inverted.target == other.target
    assert twin.session.state.history == env.session.state.history
    same(twin.observe(), env.observe())
    if over:
        with pytest.raises(gym.error.ResetNeeded):
            twin.step(5)
        same(
            twin.look_again(env.session.prepared.evidence.inverted),
            env.look_again(env.session.prepared.evidence.inverted),
        )
    ours, theirs = env.step(5), twin.step(5)
    same(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]


def test_the_next_episode_is_under_its_own_trigger(env, other):
    first, _ = env.reset(seed=0)
    env.step(3)
    env.look_again(other)
    again, _ = env.reset(seed=0)
    same(first, again)
    own = env.session.prepared
    assert own.inverted is own.evidence.inverted
    twin = copy.deepcopy(env)
    assert twin.session.prepared.inverted.target == own.evidence.target


def test_it_needs_an_episode(infected, other):
    with pytest.raises(gym.error.ResetNeeded):
        BackdoorPruneEnv(infected).look_again(other)
