import gymnasium as gym
import numpy as np
import torch

from backdoor_gym.envs.observation import GLOBAL_FEATURES, NODE_FEATURES
from backdoor_gym.envs.wrappers import GraphObservation, to_graph, to_pyg


def test_graph_observation_is_a_sample_of_its_space(infected, plain_infected):
    env = GraphObservation(gym.make("BackdoorPrune-v0", infected=[infected, plain_infected]))
    observation, info = env.reset(seed=0, options={"infected": plain_infected})
    assert env.observation_space.contains(observation)
    assert observation.nodes.shape == (48, len(NODE_FEATURES))
    assert info["action_mask"].shape == (113,)
    observation, reward, _, _, info = env.step(3)
    assert env.observation_space.contains(observation)
    assert info["globals"].shape == (len(GLOBAL_FEATURES),)
    single = gym.make("BackdoorPrune-v0", infected=plain_infected)
    single.reset(seed=0)
    assert reward == single.step(3)[1]


def test_a_wrapped_environment_can_be_made_again_from_its_specification(infected_file):
    env = GraphObservation(gym.make("BackdoorPrune-v0", infected=str(infected_file)))
    again = gym.make(env.spec)
    assert again.observation_space == env.observation_space


def test_pyg_data_holds_the_same_graph(infected, plain_infected):
    env = gym.make("BackdoorPrune-v0", infected=[infected, plain_infected])
    observation, _ = env.reset(seed=0, options={"infected": plain_infected})
    data, graph = to_pyg(observation), to_graph(observation)
    data.validate()
    assert data.num_nodes == 48
    assert np.array_equal(data.x.numpy(), graph.nodes)
    assert np.array_equal(data.edge_index.numpy(), graph.edge_links.T)
    assert data.edge_attr.shape == (data.num_edges, 2)
    assert data.action_mask.dtype == torch.bool
    assert data.action_mask.tolist() == [True] * 49
