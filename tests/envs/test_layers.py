import copy
import pickle
import warnings

import numpy as np
import pytest
from pettingzoo.test import api_test, parallel_api_test, seed_test

import backdoor_gym
from backdoor_gym.envs.layers import BackdoorPruneLayersEnv, env, parallel_env
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError, UnknownNameError


def episode(layers, seed):
    """One of random legal actions: everything that was seen."""
    random = np.random.default_rng(seed)
    observations, infos = layers.reset(seed=seed)
    seen = [(observations, {}, {}, {}, infos)]
    while layers.agents:
        actions = {
            agent: int(random.choice(np.flatnonzero(observations[agent]["action_mask"]))) for agent in layers.agents
        }
        seen.append(layers.step(actions))
        observations = seen[-1][0]
    return seen


@pytest.mark.slow
def test_pettingzoo_finds_it_in_order(infected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # observations are dictionaries and no images
        parallel_api_test(parallel_env(infected=infected, max_steps=12), num_cycles=60)
        api_test(env(infected=infected, max_steps=12), num_cycles=60, verbose_progress=False)
        seed_test(lambda: env(infected=infected, max_steps=6), num_cycles=20)


def test_whole_episodes_are_the_same_for_the_same_seed(infected):
    first, second = (episode(parallel_env(infected=infected, max_steps=8), 3) for _ in range(2))
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_equal(one, other)


def test_the_agents_are_the_layers_and_own_every_neuron_once(infected):
    layers = backdoor_gym.parallel_env(infected=infected)
    layers.reset(seed=0)
    prepared = layers.single.session.prepared
    assert layers.possible_agents == [layer.name for layer in prepared.neurons.layers]
    owned = np.concatenate([layers.units[agent] for agent in layers.possible_agents])
    assert sorted(owned) == list(range(len(prepared)))
    for agent, layer in zip(layers.possible_agents, prepared.neurons.layers, strict=True):
        assert layers.action_space(agent).n == layer.size + 1
        assert layers.observation_space(agent) is layers.observation_space(agent)


def test_a_coupled_group_belongs_to_the_first_of_its_layers(infected):
    layers = parallel_env(infected=infected, residual="group")
    layers.reset(seed=0)
    prepared = layers.single.session.prepared
    assert max(len(unit) for unit in prepared.units) > 1
    first = prepared.neurons.layer_index[[unit.min() for unit in prepared.units]]
    for agent, units in layers.units.items():
        assert {prepared.neurons.layers[first[unit]].name for unit in units} == {agent}
    assert sum(len(units) for units in layers.units.values()) == len(prepared)
    assert len(layers.possible_agents) < len(prepared.neurons.layers)


def test_a_round_is_the_single_agents_prunes_in_network_order(infected):
    # Derivatives are taken when there is something to be seen: after a round, or after each of the single agent's steps.
    layers, single = parallel_env(infected=infected, gradients_every=1), BackdoorPruneEnv(infected, gradients_every=1)
    observations, _ = layers.reset(seed=0)
    single.reset(seed=0)
    actions = dict.fromkeys(layers.agents, 2)
    observations, rewards, _, _, infos = layers.step(actions)
    total, names = 0.0, []
    for agent in layers.possible_agents:
        observation, reward, _, _, info = single.step(int(layers.units[agent][2]))
        total += reward
        names.append(info["neuron"])
    assert list(set(rewards.values())) == [pytest.approx(total)]
    assert [infos[agent]["neuron"] for agent in layers.possible_agents] == names
    assert infos[layers.agents[0]]["acc"] == info["acc"]
    for agent, units in layers.units.items():
        np.testing.assert_array_equal(observations[agent]["observation"]["nodes"], observation["nodes"][units])
        np.testing.assert_array_equal(observations[agent]["action_mask"][:-1], single.action_masks()[:-1][units])


def test_an_agent_that_stopped_stays_stopped_and_all_end_together(infected):
    layers = parallel_env(infected=infected)
    layers.reset(seed=0)
    first, *others = layers.agents
    stop = {agent: len(layers.units[agent]) for agent in layers.agents}
    observations, rewards, terminations, _, infos = layers.step({**stop, others[0]: 1})
    assert infos[first]["stopped"]
    assert not infos[others[0]]["stopped"]
    assert observations[first]["action_mask"].tolist() == [0] * len(layers.units[first]) + [1]
    assert not any(terminations.values())
    assert layers.agents == layers.possible_agents
    before = layers.single.session.state.pruned.sum()
    _, rewards, terminations, truncations, infos = layers.step({**stop, first: 0})  # it is not heard any more
    assert layers.single.session.state.pruned.sum() == before
    assert infos[first]["neuron"] == ""
    assert set(rewards.values()) == {0.0}
    assert all(terminations.values())
    assert not any(truncations.values())
    assert layers.agents == []


def test_the_guard_holds_in_a_round(infected):
    layers = parallel_env(infected=infected, accuracy_budget=0.0, max_failures=3)
    layers.reset(seed=0)
    random = np.random.default_rng(0)
    while layers.agents:
        actions = {agent: int(random.integers(len(layers.units[agent]))) for agent in layers.agents}
        _, _, terminations, truncations, infos = layers.step(actions)
    single = layers.single
    assert single.session.figures.acc >= single.session.initial_figures.acc - 1e-9
    assert all(terminations.values()) or all(truncations.values())
    assert sum(info["undone"] for info in infos.values()) <= 3


def test_rounds_are_counted(infected):
    layers = parallel_env(infected=infected, max_steps=2, accuracy_budget=None)
    observations, _ = layers.reset(seed=0)
    left = [observations[layers.agents[0]]["observation"]["globals"][5]]
    for _ in range(2):
        observations, _, terminations, truncations, _ = layers.step(dict.fromkeys(layers.agents, 0))
        left.append(next(iter(observations.values()))["observation"]["globals"][5])
    assert left == [1.0, 0.5, 0.0]
    assert all(truncations.values())
    assert not any(terminations.values())


def test_links_are_those_inside_the_layer(infected):
    layers = parallel_env(infected=infected)
    observations, _ = layers.reset(seed=0)
    graph, total = layers.single.session.prepared.graph, 0
    for agent, units in layers.units.items():
        inner = observations[agent]["observation"]
        count = int(inner["num_edges"][0])
        total += count
        for (strength,), (source, target) in zip(inner["edges"][:count], inner["edge_links"][:count], strict=True):
            match = (graph.edge_links == [units[source], units[target]]).all(1) & (graph.edges[:, 1] == 1)
            assert strength == graph.edges[match, 0].max()
    assert total == (graph.edges[:, 1] == 1).sum()


def test_the_state_is_the_whole_network(infected):
    layers = parallel_env(infected=infected)
    layers.reset(seed=0)
    state = layers.state()
    assert state.shape == layers.state_space.shape
    assert layers.state_space.contains(state)
    np.testing.assert_array_equal(
        state[: -len(layers.single.observe()["globals"])], layers.single.observe()["nodes"].ravel()
    )


def test_what_cannot_be_is_refused(infected, plain_infected):
    with pytest.raises(DataError, match="one network"):
        parallel_env(infected=[infected, plain_infected])
    with pytest.raises(UnknownNameError, match="render mode"):
        parallel_env(infected=infected, render_mode="video")
    layers = BackdoorPruneLayersEnv(infected)
    layers.reset(seed=0)
    with pytest.raises(DataError, match="needs an action"):
        layers.step({layers.agents[0]: 0})
    with pytest.raises(DataError, match="needs an action"):
        layers.step(dict.fromkeys(layers.agents, 10_000))


def test_it_can_be_drawn(infected):
    layers = parallel_env(infected=infected, render_mode="rgb_array")
    layers.reset(seed=0)
    layers.step(dict.fromkeys(layers.agents, 0))
    assert layers.render().shape == (640, 1024, 3)
    layers.close()


@pytest.mark.slow
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_in_mid_episode_goes_on_where_it_was(twin_of):
    env = parallel_env(score_samples=0)
    env.reset(seed=0)
    first = env.agents[0]
    env.step({agent: 3 if agent == first else env.action_space(agent).n - 1 for agent in env.agents})
    twin = twin_of(env)
    assert twin.agents == env.agents
    actions = {agent: 5 if agent == first else 0 for agent in env.agents}
    mine, its = env.step(actions), twin.step(actions)
    assert mine[1:4] == its[1:4]
    assert all(
        np.array_equal(mine[0][agent]["observation"]["nodes"], its[0][agent]["observation"]["nodes"])
        for agent in env.agents
    )
