"""What is kept from step to step changes nothing but the time."""

import numpy as np
import pytest
import torch

from backdoor_gym.agents.embedding_cache import EmbeddingCache
from backdoor_gym.agents.encoder import EncoderOptions, GraphActorCritic, as_tensors
from backdoor_gym.envs.prune import BackdoorPruneEnv


@pytest.fixture(params=[True, False], ids=["graph", "mlp"])
def network(request):
    torch.manual_seed(0)
    return GraphActorCritic(EncoderOptions(message_passing=request.param)).eval()


@pytest.fixture
def embedded(network, monkeypatch):
    """How often a graph was embedded."""
    calls = []
    embed = network.embed_graphs
    monkeypatch.setattr(network, "embed_graphs", lambda observation: calls.append(1) or embed(observation))
    return calls


def step(env, model=None, action=None):
    return env.reset(seed=0, options={"infected": model})[0] if model is not None else env.step(action)[0]


def same(cached, network, observations):
    batch = as_tensors({key: np.stack([one[key] for one in observations]) for key in observations[0]})
    found = cached(batch)
    with torch.no_grad():
        expected = network(batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_graph_is_embedded_once_an_episode_and_after_the_weights_change(infected, plain_infected, network, embedded):
    options = {"infected": [infected, plain_infected], "accuracy_budget": None, "score_samples": 0}
    envs = [BackdoorPruneEnv(**options) for _ in range(3)]
    cached = EmbeddingCache(network)

    def count(observations):
        before = len(embedded)
        same(cached, network, observations)
        return len(embedded) - before - 1

    models = (infected, plain_infected, infected)
    assert count([step(env, model) for env, model in zip(envs, models, strict=True)]) == 2  # two graphs of three
    assert count([step(env, action=3) for env in envs]) == 0
    assert count([step(envs[0], plain_infected), *(step(env, action=4) for env in envs[1:])]) == 0
    assert count([step(env, infected) for env in envs]) == 0
    assert count([step(env, plain_infected) for env in envs]) == 1  # none of them had it any more
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    sum(weight.sum() for weight in network.parameters()).backward()
    optimizer.step()
    assert count([step(env, action=5) for env in envs]) == 1
    network.load_state_dict({key: value + 0.01 for key, value in network.state_dict().items()})
    assert count([step(env, action=6) for env in envs]) == 1
