import gymnasium as gym
import numpy as np
import pytest
import torch

import backdoor_gym
from backdoor_gym.agents.encoder import PADDING, EncoderOptions, GraphActorCritic, as_tensors
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.errors import BackdoorGymError, DataError

gym.register_envs(backdoor_gym)


@pytest.fixture(scope="module")
def observations(infected, plain_infected):
    env = gym.make("BackdoorPrune-v0", infected=[infected, plain_infected], accuracy_budget=None, score_samples=0)
    seen = []
    for model in (infected, plain_infected):
        env.reset(seed=0, options={"infected": model})
        for action in (3, 17, 30):
            seen.append(env.step(action)[0])
    return seen


@pytest.fixture(params=[True, False], ids=["graph", "mlp"])
def network(request):
    torch.manual_seed(0)
    return GraphActorCritic(EncoderOptions(message_passing=request.param)).eval()


def stacked(observations):
    return as_tensors({key: np.stack([one[key] for one in observations]) for key in observations[0]})


def trimmed(observation, spare=0):
    """The same with only ``spare`` rows of padding."""
    nodes, edges = int(observation["num_nodes"][0]) + spare, int(observation["num_edges"][0]) + spare
    rows = {"nodes": nodes, "edges": edges, "edge_links": edges}
    return {key: value[: rows[key]] if key in rows else value for key, value in observation.items()}


def test_shapes_and_size(network, observations):
    logits, values = network(stacked(observations))
    assert logits.shape == (6, 113)
    assert values.shape == (6, 1)
    assert sum(parameter.numel() * 4 for parameter in network.parameters()) < 500_000


def test_padding_never_changes_the_output(network, observations):
    small = observations[-1]
    count = int(small["num_nodes"][0])
    whole, value = network(stacked([small]))
    for spare in (0, 7):
        logits, other = network(as_tensors(trimmed(small, spare)))
        torch.testing.assert_close(logits[:, :count], whole[:, :count], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[:, -1], whole[:, -1])
        torch.testing.assert_close(other, value)
    assert (whole[0, count:-1] == PADDING).all()


def test_twice_the_neurons_look_no_more_infected(network, observations):
    """Beside itself once more, unconnected: the odds of stopping and the value are those of one."""
    one = trimmed(observations[0])
    count = int(one["num_nodes"][0])
    two = {**one, "nodes": np.concatenate([one["nodes"]] * 2), "edges": np.concatenate([one["edges"]] * 2)}
    two["edge_links"] = np.concatenate([one["edge_links"], one["edge_links"] + count])
    two |= {key: 2 * one[key] for key in ("num_nodes", "num_edges")}
    (logits, value), (doubled, other) = network(as_tensors(one)), network(as_tensors(two))
    torch.testing.assert_close(doubled[:, -1], logits[:, -1])
    torch.testing.assert_close(other, value)


def test_what_lies_in_the_padding_never_matters(network, observations):
    small = {key: value.copy() for key, value in observations[-1].items()}
    clean, _ = network(as_tensors(small))
    small["nodes"][int(small["num_nodes"][0]) :] = 5
    small["edges"][int(small["num_edges"][0]) :] = 1
    small["edge_links"][int(small["num_edges"][0]) :] = 3
    dirty, _ = network(as_tensors(small))
    torch.testing.assert_close(dirty, clean)


def test_a_batch_gives_what_its_members_give(network, observations):
    together, values = network(stacked(observations))
    for index, observation in enumerate(observations):
        logits, value = network(as_tensors(observation))
        torch.testing.assert_close(together[index], logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values[index], value[0], atol=1e-5, rtol=1e-4)


def test_observations_of_one_graph_may_share_its_edges(network, observations):
    apart, values = network(stacked(observations))
    shared = stacked(observations)
    for key in ("edges", "edge_links", "num_edges"):
        shared[key] = shared[key][[0, 3]]
    shared["graph"] = torch.tensor([0, 0, 0, 1, 1, 1])
    together, others = network(shared)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(others, values, atol=1e-5, rtol=1e-4)


def test_reordering_the_neurons_reorders_the_logits(network, observations):
    observation = trimmed(observations[0])
    count = int(observation["num_nodes"][0])
    order = np.random.default_rng(0).permutation(count)  # new place i holds old neuron order[i]
    place = np.argsort(order)
    edges = np.random.default_rng(1).permutation(len(observation["edges"]))
    moved = {
        **observation,
        "nodes": observation["nodes"][order],
        "edges": observation["edges"][edges],
        "edge_links": place[observation["edge_links"][edges]],
    }
    before, value = network(as_tensors(observation))
    after, other = network(as_tensors(moved))
    torch.testing.assert_close(after[0, :-1], before[0, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[0, -1], before[0, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other, value, atol=1e-5, rtol=1e-4)


def test_edges_matter_to_the_graph_network_alone(network, observations):
    observation = dict(observations[0])
    before, _ = network(as_tensors(observation))
    observation["num_edges"] = observation["num_edges"] // 2
    after, _ = network(as_tensors(observation))
    assert torch.equal(before, after) == (not network.options.message_passing)


def test_ignored_features_are_not_seen(observations):
    torch.manual_seed(0)
    network = GraphActorCritic(EncoderOptions(ignore=("kl", "accuracy"))).eval()
    observation = {key: value.copy() for key, value in observations[0].items()}
    before, _ = network(as_tensors(observation))
    observation["nodes"][:, NODE_FEATURES.index("kl")] += 1
    observation["globals"][0] -= 0.1
    after, _ = network(as_tensors(observation))
    assert torch.equal(before, after)
    observation["nodes"][:, NODE_FEATURES.index("uclc")] += 1
    assert not torch.equal(network(as_tensors(observation))[0], before)


def test_neurons_share_what_stopping_leaves(network, observations):
    """Legal neurons sum to 1, so the stop logit is the log odds of stopping for any number of neurons."""
    logits, _ = network(stacked(observations))
    for row, observation in zip(logits, observations, strict=True):
        legal = torch.from_numpy(observation["action_mask"][:-1].astype(bool))
        assert row[:-1][legal].exp().sum().item() == pytest.approx(1, abs=1e-4)
        assert row[:-1][~legal].exp().sum().item() == 0


def test_gradients_reach_every_weight(observations):
    network = GraphActorCritic(EncoderOptions())
    logits, values = network(stacked(observations))
    (torch.log_softmax(logits, 1)[:, 0].sum() + values.sum()).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


def test_unusable_options_are_named():
    with pytest.raises(BackdoorGymError, match="feature 'colour'"):
        EncoderOptions(ignore=("colour",))
    with pytest.raises(DataError, match="hidden"):
        EncoderOptions(hidden=7, heads=2)
