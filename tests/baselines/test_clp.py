import copy
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from backdoor_gym.analysis.uclc import spectral_norms
from backdoor_gym.baselines import CLP, clp
from backdoor_gym.errors import DataError, WeightsError
from backdoor_gym.metrics import evaluate
from backdoor_gym.networks import build
from backdoor_gym.policies.thresholds import choose_threshold

from ..conftest import settle


def published_clp(network: nn.Module, pairs: list[tuple[str, str]], u: float) -> dict[str, list[int]]:
    """The published rule, a channel at a time: which channels of each batch normalisation are pruned."""
    pruned = {}
    for conv_name, norm_name in pairs:
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        sigma = norm.running_var.double().sqrt()
        bounds = []
        for channel in range(conv.out_channels):
            kernel = conv.weight[channel].detach().double().reshape(conv.in_channels, -1)
            bounds.append(torch.linalg.svdvals(kernel)[0] * (norm.weight[channel].double() / sigma[channel]).abs())
        values = torch.stack(bounds).detach()
        limit = values.mean() + u * values.std()
        pruned[norm_name] = torch.nonzero(values > limit).flatten().tolist()
    return pruned


def resnet_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Each batch normalisation of a plain residual network with the convolution before it."""
    modules = [(name, module) for name, module in network.named_modules()]
    pairs, conv = [], ""
    for name, module in modules:
        if isinstance(module, nn.Conv2d):
            conv = name
        elif isinstance(module, nn.BatchNorm2d):
            # Within a block conv1, bn1, conv2, bn2 follow one another, and so do the two modules of a shortcut.
            pairs.append((conv, name))
    return pairs


def trained_looking(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = settle(build(name, 10, 3, width=16), seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # heavy tails, so that something stands out
                module.weight *= torch.rand(len(module.weight), 1, 1, 1).pow(-0.5)
    return network


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
@pytest.mark.parametrize("u", [1.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_plain_networks_lose_exactly_the_published_channels(name, u, seed):
    network = trained_looking(name, seed)
    expected = published_clp(network, resnet_pairs(network), u)
    assert sum(map(len, expected.values())) > 0
    repaired = clp.prune(network, u=u)
    for norm, channels in expected.items():
        weight = repaired.get_submodule(norm).weight
        bias = repaired.get_submodule(norm).bias
        assert torch.nonzero((weight == 0) & (bias == 0)).flatten().tolist() == channels, norm


def test_pruning_is_in_a_copy_unless_asked():
    network = trained_looking("resnet18", 0)
    before = copy.deepcopy(network.state_dict())
    assert clp.prune(network, u=1.5) is not network
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert clp.prune(network, u=1.5, inplace=True) is network
    assert not all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["preact_resnet18", "wrn16"])
def test_preactivation_networks_are_pruned_at_the_bn_that_reads_the_sum(name):
    network = trained_looking(name, 1)
    with torch.no_grad():  # one channel of the stream, through the convolution that writes it
        network.layer2[0].conv2.weight[5] *= 100
    repaired = clp.prune(network, u=2.5)
    for norm in ("layer2.1.bn1", "layer3.0.bn1"):
        assert repaired.get_submodule(norm).weight[5] == 0


def test_networks_without_batch_normalisation_are_not_passed_over():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 30), nn.ReLU(), nn.Linear(30, 3)
    )
    with torch.no_grad():
        network[0].weight[7] *= 30
        network[3].weight[11] *= 30
    repaired = clp.prune(network, u=3.0)
    assert [not channel.any() for channel in repaired[0].weight] == [index == 7 for index in range(20)]
    assert [not row.any() for row in repaired[3].weight] == [index == 11 for index in range(30)]
    assert repaired[0].bias[7] == 0
    assert torch.equal(repaired[5].weight, network[5].weight)


def test_the_policy_prunes_what_the_function_prunes(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None)
    policy, pruned = CLP(env, u=1.5), []
    observation, info = env.reset(seed=0)
    done = False
    while not done:
        action, _ = policy.predict(observation)
        observation, _, terminated, truncated, info = env.step(action)
        pruned += [info["neuron"]] if info["neuron"] else []
        done = terminated or truncated
    repaired = clp.prune(infected.network, u=1.5)
    prepared = env.unwrapped.session.prepared
    expected = {
        f"{layer.name}[{channel}]"
        for layer in prepared.neurons.layers
        for channel in torch.nonzero(repaired.get_submodule(layer.module).weight == 0).flatten().tolist()
    }
    assert set(pruned) == expected
    assert len(expected) > 3
    assert terminated


def test_auto_keeps_the_budget_as_a_function_and_as_a_policy(infected):
    clean = infected.clean.images, infected.clean.labels
    budget = 0.03
    repaired = clp.prune(infected.network, u="auto", clean=clean, accuracy_budget=budget)
    before = evaluate(infected.network, *clean).acc
    assert before - evaluate(repaired, *clean).acc <= budget + 1e-9

    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None, score_samples=0)
    _, lengths = evaluate_policy(CLP(env, "auto", budget), env, 1, return_episode_rewards=True, warn=False)
    zeros = sum(int((m.weight == 0).sum()) for m in repaired.modules() if isinstance(m, nn.BatchNorm2d))
    assert zeros > 0
    assert lengths == [zeros + 1]  # the last step is the stop


def test_auto_goes_down_to_the_last_threshold_within_the_budget():
    scores = np.array([9.05, 6.05, 3.05, 2.05])
    asked = []

    def clean_accuracy(pruned):
        asked.append(int(pruned.sum()))
        return [1.0, 1.0, 0.99, 0.985, 0.9][int(pruned.sum())]

    assert choose_threshold(scores, clean_accuracy, 0.02) == 2.05
    assert asked == [0, 1, 2, 3, 4]  # one look at each set
    assert choose_threshold(scores, lambda pruned: 1.0 - 0.1 * pruned[1], 0.02) == 6.05


def test_auto_chooses_anew_for_each_episode(infected, plain_infected):
    env = gym.make("BackdoorPrune-v0", infected=[infected, plain_infected], accuracy_budget=None, score_samples=0)
    policy = CLP(env, "auto", 0.05)
    chosen = []
    for model in (infected, plain_infected, infected):
        observation, _ = env.reset(options={"infected": model})
        policy.predict(observation)
        chosen.append(policy.settings()["u"])
    assert chosen[0] == chosen[2] != chosen[1]


@pytest.mark.slow
def test_auto_works_in_a_vector_environment(infected, plain_infected):
    def make():
        return gym.make("BackdoorPrune-v0", infected=[infected, plain_infected], accuracy_budget=None, score_samples=0)

    env = DummyVecEnv([make, make])
    env.seed(0)
    rewards, lengths = evaluate_policy(
        CLP(env, "auto"), env, n_eval_episodes=4, return_episode_rewards=True, warn=False
    )
    assert len(rewards) == 4
    assert max(lengths) > 1


def test_evaluate_policy_runs_clp(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None)
    mean, deviation = evaluate_policy(CLP(env), env, n_eval_episodes=2, warn=False)
    assert deviation == 0
    assert mean <= 1


def test_the_class_prunes_as_the_module_does(infected):
    expected = clp.prune(infected.network, u=1.5).state_dict()
    found = CLP.prune(infected.network, u=1.5).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_unusable_thresholds_are_refused(network_of):
    for u in (np.float32(3), np.int64(3), 3):
        CLP(None, u)
    for u in ("automatic", float("nan"), True):
        with pytest.raises(DataError, match="threshold must be a number"):
            clp.prune(network_of("resnet18"), u=u)
        with pytest.raises(DataError, match="threshold must be a number"):
            CLP(None, u)
    with pytest.raises(DataError, match="clean images"):
        clp.prune(network_of("resnet18"), u="auto")
    spoiled = network_of("resnet18")
    spoiled.conv1.weight.data[0] = float("nan")
    with pytest.raises(WeightsError, match="finite"):
        clp.prune(spoiled)


def test_the_bounds_are_several_times_faster_than_one_svd_a_channel():
    torch.manual_seed(0)
    weights = [torch.randn(256, 128, 3, 3), torch.randn(256, 256, 3, 3)]

    def one_by_one():
        return [torch.svd(channel.flatten(1))[1].max() for weight in weights for channel in weight]

    def seconds(function):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    spectral_norms(weights[0])
    assert seconds(one_by_one) >= 3 * seconds(lambda: [spectral_norms(weight) for weight in weights])
