"""The vector environment is ``SyncVectorEnv`` of the single ones, to the last bit, whatever the threads do."""

import threading

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import backdoor_gym
from backdoor_gym.envs import prefetch as ahead
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.vector import BackdoorPruneVectorEnv
from backdoor_gym.errors import DataError

pytestmark = pytest.mark.usefixtures("two_threads")


def play(env, steps, seed=0, reset_every=None):
    """All that a vector environment returns, with random actions, some of them not legal and some stops."""
    random = np.random.default_rng(seed)
    returned = [env.reset(seed=seed)]
    ended = np.zeros(env.num_envs, dtype=bool)
    stop = env.single_action_space.n - 1
    for step in range(1, steps):
        again = ended if env.autoreset_mode is AutoresetMode.DISABLED else np.zeros_like(ended)
        if reset_every and step % reset_every == 0:
            again = again | (np.arange(env.num_envs) == step % env.num_envs)
        if again.any():
            returned.append(env.reset(seed=seed + step, options={"reset_mask": again.copy()}))
        actions = np.where(random.random(env.num_envs) < 0.1, stop, random.integers(stop, size=env.num_envs))
        returned.append(env.step(actions))
        ended = returned[-1][2] | returned[-1][3]
    return returned


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("reset_every", [None, 5])
def test_equal_to_single_environments_bit_for_bit(infected_file, plain_infected_file, mode, reset_every):
    options = {"infected": [str(infected_file), str(plain_infected_file)], "max_steps": 4}
    vector = BackdoorPruneVectorEnv(3, autoreset_mode=mode, **options)
    sync = SyncVectorEnv([lambda: BackdoorPruneEnv(**options)] * 3, autoreset_mode=mode)
    assert data_equivalence(
        play(vector, 12, reset_every=reset_every), play(sync, 12, reset_every=reset_every), exact=True
    )
    assert vector.observation_space == sync.observation_space
    assert vector.action_space == sync.action_space
    vector.close()
    sync.close()


def test_gymnasium_makes_it(infected_file):
    env = gym.make_vec(
        "BackdoorPrune-v0", num_envs=2, vectorization_mode="vector_entry_point", infected=str(infected_file)
    )
    assert isinstance(env, BackdoorPruneVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert (env.spec.id, env.num_envs) == ("BackdoorPrune-v0", 2)
    observations, _ = env.reset(seed=3)
    assert env.observation_space.contains(observations)
    single = gym.make("BackdoorPrune-v0", infected=str(infected_file))
    assert data_equivalence({key: value[1] for key, value in observations.items()}, single.reset(seed=4)[0], exact=True)
    assert len(env.call("action_masks")) == 2
    env.close()


@pytest.mark.slow
def test_sub_environments_work_at_the_same_time_on_one_core_each(infected_file):
    meeting = threading.Barrier(2, timeout=60)
    threads = []

    def reward(transition):
        meeting.wait()  # broken unless two of them are here at once
        threads.append(torch.get_num_threads())
        return 0.0

    env = BackdoorPruneVectorEnv(2, infected=str(infected_file), reward=reward, accuracy_budget=None)
    env.reset(seed=0)
    env.step([0, 1])
    assert threads == [1, 1]
    assert torch.get_num_threads() == 2
    env.close()


@pytest.mark.slow
def test_large_networks_step_in_turn_on_all_cores(infected_file, monkeypatch):
    seen = []
    options = {
        "infected": str(infected_file),
        "accuracy_budget": None,
        "reward": lambda transition: seen.append((threading.current_thread(), torch.get_num_threads())) or 0.5,
    }
    light = BackdoorPruneVectorEnv(2, **options)
    light.reset(seed=0)
    beside = light.step([0, 1])
    monkeypatch.setattr(ahead, "SIDE_BY_SIDE_BYTES", light.get_attr("session")[0].pass_bytes - 1)
    seen.clear()
    light.reset(seed=0)
    assert data_equivalence(light.step([0, 1]), beside, exact=True)
    assert seen == [(threading.main_thread(), 2)] * 2
    light.close()


@pytest.mark.slow
def test_a_model_is_made_ready_once(infected, monkeypatch):
    made = []
    seek = backdoor_gym.session.prepared_model.find_evidence
    monkeypatch.setattr(
        backdoor_gym.session.prepared_model, "find_evidence", lambda *arguments: made.append(1) or seek(*arguments)
    )
    env = BackdoorPruneVectorEnv(3, infected=infected)
    env.reset(seed=0)
    assert len(made) == 1
    wholes = {id(one.session.masked._clean[0].network._parts[0]._whole) for one in env.get_attr("unwrapped")}
    assert len(wholes) == 1
    env.close()


@pytest.mark.slow
def test_a_failed_step_leaves_nothing_behind(infected_file):
    def reward(transition):
        if transition.unit == 3:
            raise RuntimeError("no reward for this one")
        return 0.5

    env = BackdoorPruneVectorEnv(3, infected=str(infected_file), reward=reward, accuracy_budget=None)
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="no reward"):
        env.step([3, 4, 5])
    env.reset(seed=0)
    _, rewards, *_ = env.step([6, 7, 8])
    assert rewards == pytest.approx([0.498] * 3)
    env.close()


@pytest.mark.slow
def test_what_cannot_be_is_named(infected_file):
    with pytest.raises(DataError, match="at least 1"):
        BackdoorPruneVectorEnv(0, infected=str(infected_file))
    with pytest.raises(DataError, match="rgb_array"):
        BackdoorPruneVectorEnv(2, infected=str(infected_file), render_mode="human")
    env = BackdoorPruneVectorEnv(2, infected=str(infected_file), render_mode="rgb_array")
    env.reset(seed=0)
    assert [frame.shape for frame in env.render()] == [env.render()[0].shape] * 2
    env.close()
