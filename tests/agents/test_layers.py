"""Agents of layers: what they see, how they are trained together, and how they act as one policy."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from pettingzoo.test import parallel_api_test
from stable_baselines3.common.evaluation import evaluate_policy

from backdoor_gym import policies
from backdoor_gym.agents import ONP
from backdoor_gym.agents.layer_training import train_layers
from backdoor_gym.agents.layers import (
    LAYER_ENCODER,
    PER_LAYER,
    LayerPolicy,
    LayersVecEnv,
    PaddedLayersEnv,
    as_graph,
    by_layer,
    largest,
)
from backdoor_gym.agents.warm_start import examples
from backdoor_gym.envs.layers import owners, parallel_env
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError


@pytest.fixture
def files(infected_file, plain_infected_file):
    return [str(infected_file), str(plain_infected_file)]


class Scripted:
    """Stands for the shared policy: says what a function of what an agent sees says."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def predict(self, observation, *_, **__):
        self.asked.append(len(observation["nodes"]))
        count = len(observation["nodes"])
        rows = [{key: value[index] for key, value in observation.items()} for index in range(count)]
        return np.array([self.answer(row) for row in rows]), None


def first_legal(row):
    return int(np.flatnonzero(row["action_mask"])[0])


def test_a_policy_sees_the_graph_of_the_layer(infected):
    layers = parallel_env(infected=infected)
    observations, _ = layers.reset(seed=0)
    agent = max(observations, key=lambda name: int(observations[name]["observation"]["num_edges"][0]))
    seen = observations[agent]
    count, edges = len(layers.units[agent]), int(seen["observation"]["num_edges"][0])
    graph = as_graph(seen, count + 3)
    assert edges > 0
    np.testing.assert_array_equal(graph["nodes"][:count], seen["observation"]["nodes"])
    assert not graph["nodes"][count:].any()
    np.testing.assert_array_equal(
        graph["edges"][:edges], np.hstack([seen["observation"]["edges"], np.ones((edges, 1))])
    )
    assert graph["action_mask"].tolist() == [1] * count + [0] * 3 + [1]
    assert (int(graph["num_nodes"][0]), int(graph["num_edges"][0])) == (count, edges)


def test_a_round_is_played_in_network_order_and_who_stops_keeps_stopping(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None)
    observation, _ = env.reset(seed=0)
    owned = owners(env.victim.defender)
    last = list(owned)[-1]

    def but_the_last_layer(row):
        return first_legal(row) if int(row["num_nodes"][0]) != len(owned[last]) or row["nodes"][0, 0] != tag else -1

    tag = observation["nodes"][owned[last][0], 0]
    scripted = Scripted(lambda row: len(row["action_mask"]) - 1 if but_the_last_layer(row) < 0 else first_legal(row))
    policy = LayerPolicy(scripted, env)
    actions, start = [], np.ones(1, dtype=bool)
    for _ in range(2 * (len(owned) - 1)):
        action, _ = policy.predict(observation, None, start, deterministic=True)
        actions.append(int(action))
        observation, *_ = env.step(int(action))
        start = np.zeros(1, dtype=bool)
    acting = [units for name, units in owned.items() if name != last]
    assert actions == [int(units[0]) for units in acting] + [int(units[1]) for units in acting]
    assert scripted.asked == [len(owned), len(owned) - 1]


def test_it_stops_when_all_agents_have(infected):
    env = BackdoorPruneEnv(infected)
    observation, _ = env.reset(seed=0)
    policy = LayerPolicy(Scripted(lambda row: len(row["action_mask"]) - 1), env)
    action, _ = policy.predict(observation, None, np.ones(1, dtype=bool), deterministic=True)
    assert int(action) == env.stop_action


def test_as_one_policy_and_as_agents_it_does_the_same(infected):
    onp = ONP(encoder=LAYER_ENCODER, seed=0)
    onp.threshold = onp.verdict_threshold = 0.01  # untrained, it would stop somewhere
    single = BackdoorPruneEnv(infected, max_steps=20)
    layers = parallel_env(infected=infected)
    policy = LayerPolicy(onp, single)
    observation, _ = single.reset(seed=0)
    start, done, pruned = np.ones(1, dtype=bool), False, []
    seen, infos = layers.reset(seed=0)
    expected = []
    while len(expected) < 12 and layers.agents:
        seen, _, _, _, infos = layers.step(policy.actions(seen))
        expected.extend(info["neuron"] for info in infos.values() if info["neuron"])
    while not done and len(pruned) < len(expected):
        action, _ = policy.predict(observation, None, start, deterministic=True)
        observation, _, terminated, truncated, info = single.step(int(action))
        start, done = np.zeros(1, dtype=bool), terminated or truncated
        if info["neuron"]:
            pruned.append(info["neuron"])
    assert pruned
    assert pruned == expected[: len(pruned)]


def test_every_agent_is_an_environment(files):
    vector = LayersVecEnv(files, seats=2, max_steps=3, reward="oracle", score_samples=32)
    assert vector.num_envs == 2 * vector.slots
    vector.seed(0)
    observations = vector.reset()
    masks = np.stack(vector.env_method("action_masks"))
    assert all(vector.observation_space[key].contains(value[0]) for key, value in observations.items())
    assert {info["infected"] for info in vector.reset_infos} == {"tiny", "tiny-plain"}
    nobody = observations["num_nodes"][:, 0] == 0
    assert nobody.any(), "the two have as many layers"
    assert masks[nobody].sum() == nobody.sum()
    stop = masks.shape[1] - 1
    _, rewards, dones, _ = vector.step([stop if nobody[i] else int(np.flatnonzero(m)[0]) for i, m in enumerate(masks)])
    for seat in range(2):
        mine = slice(seat * vector.slots, (seat + 1) * vector.slots)
        assert len(set(rewards[mine][~nobody[mine]])) == 1
        assert not rewards[mine][nobody[mine]].any()
    assert not dones.any()
    _, _, dones, infos = vector.step([stop] * vector.num_envs)
    assert dones.all()
    assert "terminal_observation" in infos[0]
    assert infos[0]["episode"]["l"] == 2
    assert "episode" not in infos[1]
    vector.close()


def test_pettingzoo_finds_the_padded_environment_in_order(files):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # observations are dictionaries and no images
        parallel_api_test(PaddedLayersEnv(files, *largest(files), max_steps=4), num_cycles=30)


def test_too_few_models_are_named(files):
    with pytest.raises(DataError, match="lower seats"):
        LayersVecEnv(files, seats=3)


def test_examples_by_layer_prefer_what_the_whole_prefers(infected):
    whole = examples([infected], score_samples=32)[0]
    env = BackdoorPruneEnv(infected)
    env.reset()
    owned = owners(env.victim.defender)
    parts = by_layer(whole, owned)
    assert len(parts) == len(owned)
    best = int(whole.preference[0, :-1].argmax())
    for part, units in zip(parts, owned.values(), strict=True):
        assert part.preference.shape == (len(whole.preference), len(units) + 1)
        assert np.allclose(part.preference.sum(1), 1)
        if best in units:
            assert units[part.preference[0].argmax()] == best
    done = whole.preference[:, -1] == 1
    assert all(np.allclose(part.preference[done, -1], 1) for part in parts)


def test_trained_saved_and_used_like_any_policy(files, tmp_path):
    out, said = tmp_path / "layers.safetensors", []
    onp = train_layers(
        files, files[:1], 300, out, seats=2, epochs=3, report=said.append, n_steps=4, batch_size=32, n_epochs=1
    )
    assert onp.facts[PER_LAYER]
    assert not (tmp_path / "layers.safetensors.checkpoint").exists()
    assert any("warm start" in line for line in said)
    env = BackdoorPruneEnv(files[0], max_steps=5)
    policy = policies.make_policy(str(out), env, {})
    assert isinstance(policy, LayerPolicy)
    mean, _ = evaluate_policy(
        LayerPolicy(onp, wrapped := gym.make("BackdoorPrune-v0", infected=files[0], max_steps=5)),
        wrapped,
        1,
        warn=False,
    )
    assert np.isfinite(mean)
    with pytest.raises(DataError, match="finetune"):
        policies.make_policy(str(out), env, {"finetune": 10})
