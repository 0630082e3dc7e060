import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer

import backdoor_gym
from backdoor_gym.agents import EncoderOptions, GraphActorCritic, GraphRolloutBuffer
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.envs.observation import ObservationBuilder

gym.register_envs(backdoor_gym)


@pytest.fixture
def filled(infected, plain_infected):
    """The same twelve steps of two environments, which change their model halfway, in both kinds of buffer."""
    env = gym.make("BackdoorPrune-v0", infected=[infected, plain_infected], score_samples=0, accuracy_budget=None)
    buffers = [
        kind(12, env.observation_space, env.action_space, "cpu", n_envs=2)
        for kind in (GraphRolloutBuffer, MaskableDictRolloutBuffer)
    ]
    rng = np.random.default_rng(0)
    models = [infected, plain_infected]
    for step in range(12):
        rows = []
        for index in range(2):
            env.reset(seed=step, options={"infected": models[(index + step // 6) % 2]})
            rows.append(env.step(int(rng.integers(40)))[0])
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        rest = (rng.integers(0, 113, (2, 1)), rng.normal(size=2), np.zeros(2), torch.zeros(2, 1), torch.zeros(2))
        for buffer in buffers:
            buffer.add(batch, *rest, action_masks=batch["action_mask"])
    return buffers


def test_what_does_not_change_is_kept_once_a_graph(filled):
    ours, _ = filled
    assert len(ours.graphs) == 4
    assert not any(key in ours.observations for key in ("nodes", "edges", "edge_links"))


def test_nodes_are_put_together_as_they_were(filled):
    sampled = []
    for buffer in filled:
        np.random.seed(0)
        sampled.append([sample.observations["nodes"] for sample in buffer.get(7)])
    assert all(map(torch.equal, *sampled))


def test_a_rollout_of_a_network_of_4800_neurons_takes_less_than_300_megabytes():
    space = ObservationBuilder(4_800, connections=4, similar=4).space
    buffer = GraphRolloutBuffer(256, space, gym.spaces.Discrete(4_801), "cpu", n_envs=8)
    stored = [
        *buffer.observations.values(),
        *(value for value in vars(buffer).values() if isinstance(value, np.ndarray)),
    ]
    edges, nodes = 8 * 4_800, 4_800
    graphs = 8 * (
        edges * (8 + 16) + nodes * 4 * len(STATIC_FEATURES)
    )  # one a sub-environment, and new ones with each episode
    flattened = max(array.nbytes for array in stored)  # the copy that is made of one after the other
    assert sum(array.nbytes for array in stored) + graphs + flattened < 300e6


def test_the_network_sees_what_it_would_have_seen(filled):
    torch.manual_seed(0)
    network = GraphActorCritic(EncoderOptions(message_passing=True)).eval()
    sampled = []
    for buffer in filled:
        np.random.seed(0)
        sampled.append([network(sample.observations) for sample in buffer.get(7)])
    for (logits, values), (others, more) in zip(*sampled, strict=True):
        torch.testing.assert_close(logits, others, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values, more, atol=1e-5, rtol=1e-4)


def test_a_new_rollout_forgets_the_old_graphs(filled):
    ours, _ = filled
    ours.reset()
    assert ours.graphs == []
