"""What every registered id of this package must do."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import contextmanager

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.evaluation import evaluate_policy

import backdoor_gym
from backdoor_gym.baselines import CLP
from backdoor_gym.policies.contract import run_episode

IDS = sorted(name for name, spec in gym.registry.items() if str(spec.entry_point).startswith("backdoor_gym."))
#: Stable-Baselines3 says the first of each two-dimensional array in a dictionary; the graph is made of such arrays.
EXPECTED = ("unconventional shape", 'render_mode="human" needs a screen')


@contextmanager
def unexpected_warnings():
    """Collects the texts of all warnings that are not expected."""
    unexpected = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield unexpected
    texts = [str(warning.message) for warning in found]
    unexpected.extend(text for text in texts if not any(known in text for known in EXPECTED))


pytestmark = pytest.mark.parametrize("env_id", IDS)


def test_the_package_registers_environments(env_id):
    assert "BackdoorPrune-v0" in IDS


def test_gymnasium_check_env_without_unexpected_warnings(env_id):
    with unexpected_warnings() as unexpected:
        check_env(gym.make(env_id).unwrapped)
    assert not unexpected


def test_sb3_check_env_without_unexpected_warnings(env_id):
    with unexpected_warnings() as unexpected:
        sb3_check_env(gym.make(env_id).unwrapped)
    assert not unexpected


def test_specification_survives_json(env_id):
    spec = gym.make(env_id, reward="oracle", accuracy_budget=0.05, infected=["digits-badnets"]).spec
    again = EnvSpec.from_json(spec.to_json())
    assert json.loads(again.to_json()) == json.loads(spec.to_json())
    assert gym.make(again).unwrapped.accuracy_budget == 0.05


def test_environments_can_be_pickled(env_id):
    env = gym.make(env_id, accuracy_budget=0.03).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert again.accuracy_budget == 0.03
    assert data_equivalence(again.reset(seed=1), env.reset(seed=1))


@pytest.mark.slow
def test_whole_episodes_are_the_same_for_the_same_seed(env_id):
    first, second = gym.make(env_id), gym.make(env_id)
    assert data_equivalence(first.reset(seed=7), second.reset(seed=7), exact=True)
    first.action_space.seed(7)
    steps, done = 0, False
    while not done and steps < 60:
        action = first.action_space.sample()
        ours, theirs = first.step(action), second.step(action)
        assert data_equivalence(ours, theirs, exact=True)
        done = ours[2] or ours[3]
        steps += 1
    assert steps == 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_vector_environments_give_what_single_ones_give(env_id, kind):
    make = [lambda: gym.make(env_id, infected="digits-badnets", score_samples=16, clean_samples=50) for _ in range(2)]
    vector, single = kind(make), make[0]()
    observations, _ = vector.reset(seed=[3, 4])
    expected, _ = single.reset(seed=3)
    stop = single.unwrapped.stop_action
    for actions in ([5, 6], [7, 8], [stop, 9]):
        observations, rewards, terminated, _, infos = vector.step(np.array(actions))
        expected, reward, done, _, info = single.step(actions[0])
        assert data_equivalence({key: value[0] for key, value in observations.items()}, expected)
        assert (rewards[0], terminated[0]) == (reward, done)
        assert infos["acc"][0] == info["acc"]
    assert terminated.tolist() == [True, False]
    vector.close()


@pytest.mark.slow
def test_forked_environments_do_not_wait_for_threads_that_are_gone(env_id):
    code = (
        "import gymnasium as gym, backdoor_gym, torch; torch.set_num_threads(2)\n"
        "from gymnasium.vector import AsyncVectorEnv\n"
        f"make = lambda: gym.make({env_id!r}, score_samples=16, clean_samples=50)\n"
        "env = AsyncVectorEnv([make, make]); env.reset(seed=0); env.step([3, 4]); env.close(); print('done')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout.strip() == "done", done.stderr


def test_evaluate_policy_takes_clp(env_id):
    env = gym.make(env_id, accuracy_budget=None)
    mean, _ = evaluate_policy(CLP(env), env, n_eval_episodes=1, warn=False)
    assert mean == pytest.approx(run_episode(CLP(env), env, env.reset()[0]))


def test_made_by_module_name_without_an_import(env_id):
    assert gym.make(f"backdoor_gym:{env_id}").unwrapped.spec.id == env_id
    backdoor_gym._register()  # again: no warning, no change
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gym.make(env_id)
