"""The published rules against plain references: one channel, one formula at a time."""

import copy
import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch import nn
from torch.nn import functional as F

from backdoor_gym import InfectedModel
from backdoor_gym.baselines import ANP, BNP, CLP, EP, RNP, FinePruning, GreedyACC, Magnitude
from backdoor_gym.baselines.ep import bin_width, entropy
from backdoor_gym.baselines.fine_pruning import last_convolution
from backdoor_gym.baselines.rnp import UNLEARNED, unlearn
from backdoor_gym.baselines.soft_masks import SoftMasks, training_copy
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError
from backdoor_gym.metrics import evaluate
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.policies.contract import run_episode
from backdoor_gym.policies.thresholds import choose_threshold
from backdoor_gym.session.defender import Defender
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

RULES = {
    "anp": (ANP, {"steps": 8}),
    "bnp": (BNP, {"threshold": 1.5}),
    "ep": (EP, {"threshold": 1.0}),
    "fine-pruning": (FinePruning, {}),
    "magnitude": (Magnitude, {}),
    "rnp": (RNP, {}),
}


@pytest.fixture
def defender(infected) -> Defender:
    return PreparedModel(infected, Preparation()).defender


def defender_of(network: nn.Module, images: torch.Tensor) -> Defender:
    neurons = find_neurons(network)
    return Defender(network, neurons, neurons.units(), images, torch.arange(len(images)) % 10)


def read_by_hooks(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each batch normalisation reads."""
    read, hooks = {}, []
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]})))
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return read


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "preact_resnet18"])
def test_bnp_is_the_divergence_of_two_normal_distributions(network_of, name):
    network, images = network_of(name), torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    defender = defender_of(network, images)
    scores = BNP(None).scores(defender)
    read = read_by_hooks(network, images)
    for layer in defender.neurons.layers:
        norm = network.get_submodule(layer.module)
        if not layer.normalised:
            assert np.isneginf(scores[layer.neurons]).all()
            continue
        expected = []
        for channel in range(layer.size):
            values = read[layer.module][:, channel].double()
            clean = torch.distributions.Normal(values.mean(), values.std(correction=0))
            running = torch.distributions.Normal(
                norm.running_mean[channel].double(), norm.running_var[channel].double().sqrt()
            )
            expected.append(torch.distributions.kl_divergence(clean, running).item())
        expected = np.array(expected)
        expected = (expected - expected.mean()) / expected.std(ddof=1)
        np.testing.assert_allclose(scores[layer.neurons], expected, rtol=1e-4, atol=1e-5)


def test_bnp_prunes_what_stands_out_by_three_deviations(network_of):
    network, images = network_of("vgg16", width=16), torch.rand(16, 3, 32, 32)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[4].running_mean[5] += 100
    repaired = BNP.prune(network, (images, torch.arange(16) % 10))
    pruned = [module for module in repaired.modules() if isinstance(module, nn.BatchNorm2d)][4]
    assert torch.nonzero((pruned.weight == 0) & (pruned.bias == 0)).flatten().tolist() == [5]


def test_the_entropy_is_that_of_the_standardised_distribution():
    random = np.random.default_rng(0)
    count = 4_000
    modes = np.where(np.arange(count) < count // 10, 9.0, 0.0) + 0.1 * random.normal(size=count)
    columns = np.stack([5 + 3 * random.normal(size=count), random.uniform(size=count), modes, np.ones(count)], axis=1)
    found = entropy(columns)
    differential = found + np.log(bin_width(count))
    assert differential[0] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.05)
    assert differential[1] == pytest.approx(np.log(np.sqrt(12)), abs=0.05)
    assert differential[2] < 0  # two modes far apart: what the rule looks for
    assert found[3] == 0
    assert bin_width(50_000) == 0.01


def test_ep_looks_at_the_largest_pre_activation_of_each_image(network_of):
    network, images = network_of("resnet18"), torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    defender = defender_of(network, images)
    scores = EP(None).scores(defender)
    read = read_by_hooks(network, images)
    layer = defender.neurons.layers[3]
    expected = -entropy(read[layer.module].amax((2, 3)).double().numpy())
    expected = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(scores[layer.neurons], expected, rtol=1e-3, atol=1e-4)


def test_fine_pruning_takes_the_dormant_neurons_of_the_last_layer(defender):
    scores = FinePruning(None).scores(defender)
    last = defender.neurons.layers[last_convolution(defender)]
    assert last.name == "blocks.1.conv2"
    assert defender.neurons.layers[-1].name == "blocks.1.shortcut.0"  # of one pixel: not meant
    assert np.isfinite(scores).sum() == last.size
    found = {}
    norm = defender.network.get_submodule(last.module)
    hook = norm.register_forward_hook(lambda module, inputs, output: found.update(value=output))
    with torch.no_grad():
        defender.network(defender.images)
    hook.remove()
    expected = -found["value"].clamp(min=0).mean((0, 2, 3)).numpy()
    np.testing.assert_allclose(scores[last.neurons], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "preact_resnet18", "small_cnn"])
def test_the_last_convolution_is_wider_than_a_pixel(network_of, name):
    network = network_of(name)
    defender = defender_of(network, torch.rand(2, 1 if name == "small_cnn" else 3, 32, 32))
    convolutions = {key: module for key, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    wide = [key for key, module in convolutions.items() if max(module.kernel_size) > 1]
    assert defender.neurons.layers[last_convolution(defender)].name == wide[-1]


def test_magnitude_is_the_l1_norm_relative_to_the_layer():
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2), nn.ReLU(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        for module, norms in ((network[0], (1.0, 2.0, 6.0)), (network[3], (30.0, 10.0))):
            for channel, norm in zip(module.weight, norms, strict=True):
                channel.fill_(-norm / channel.numel())
    scores = Magnitude(None).scores(defender_of(network, torch.rand(4, 1, 8, 8)))
    np.testing.assert_allclose(scores, [-1 / 3, -2 / 3, -2, -1.5, -0.5], rtol=1e-6)


class NoisyNorm(nn.Module):
    """The published perturbed batch normalisation, written out for a batch."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm
        self.mask = nn.Parameter(torch.ones(norm.num_features))
        self.scale = self.shift = torch.zeros(norm.num_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        normal = (x - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + self.norm.eps).sqrt()
        weight, bias = self.norm.weight * (self.mask + self.scale), self.norm.bias * (1 + self.shift)
        return normal * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def test_anp_learns_the_masks_of_the_published_iteration(network_of):
    network = network_of("small_cnn", blocks=2)
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    defender = defender_of(network, images)
    steps, alpha, eps = 5, 0.2, 0.4
    scores = ANP(None, steps=steps, alpha=alpha, eps=eps, seed=7).scores(defender)

    plain = copy.deepcopy(network)
    names = [layer.module for layer in defender.neurons.layers]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, NoisyNorm(plain.get_submodule(name)))
    noisy = [plain.get_submodule(name) for name in names]
    random = torch.Generator().manual_seed(7)
    momenta = [torch.zeros_like(norm.mask) for norm in noisy]
    count = sum(len(norm.mask) for norm in noisy)

    def perturb(values: torch.Tensor) -> None:
        for norm, layer in zip(noisy, defender.neurons.layers, strict=True):
            norm.scale, norm.shift = values[:count][layer.neurons], values[count:][layer.neurons]

    for _ in range(steps):
        chosen = torch.randint(len(images), (128,), generator=random)
        some, labels = images[chosen], defender.labels[chosen]
        start = ((2 * torch.rand(2 * count, generator=random) - 1) * eps).requires_grad_()
        perturb(start)
        (ascent,) = torch.autograd.grad(F.cross_entropy(plain(some), labels), start)
        perturb((start + eps * ascent.sign()).clamp(-eps, eps).detach())
        robust = F.cross_entropy(plain(some), labels)
        perturb(torch.zeros(2 * count))
        loss = alpha * F.cross_entropy(plain(some), labels) + (1 - alpha) * robust
        gradients = torch.autograd.grad(loss, [norm.mask for norm in noisy])
        for index, (norm, gradient) in enumerate(zip(noisy, gradients, strict=True)):
            momenta[index] = 0.9 * momenta[index] + gradient
            norm.mask.data = (norm.mask.data - 0.2 * momenta[index]).clamp(0, 1)
    expected = torch.cat([norm.mask.detach() for norm in noisy]).numpy()
    assert 1 - expected.min() > 0.01  # something was learned
    np.testing.assert_allclose(1 - scores, expected, atol=1e-4)


def test_the_perturbation_raises_the_loss_and_stays_in_its_bounds(defender):
    masks = SoftMasks(training_copy(defender), defender.neurons)
    scale, shift = ANP(None).worst(masks, defender.images, defender.labels, torch.Generator().manual_seed(0))
    assert max(scale.abs().max(), shift.abs().max()) <= 0.4 + 1e-6
    with torch.no_grad():
        before = masks.loss(defender.images, defender.labels)
        assert masks.loss(defender.images, defender.labels, scale, shift) > before + 0.5


def test_soft_masks_of_ones_and_zeros_are_the_network_and_that_without_those_weights(defender):
    network = training_copy(defender).eval()
    masks = SoftMasks(network, defender.neurons)
    with torch.no_grad():
        whole = F.cross_entropy(defender.network(defender.images), defender.labels)
        assert masks.loss(defender.images, defender.labels).item() == pytest.approx(whole.item(), abs=1e-5)
        layer = defender.neurons.layers[1]
        masks.mask[layer.start + 3] = 0
        changed = copy.deepcopy(defender.network)
        changed.get_submodule(layer.module).weight[3] = 0
        without = F.cross_entropy(changed(defender.images), defender.labels)
        assert masks.loss(defender.images, defender.labels).item() == pytest.approx(without.item(), abs=1e-5)


@pytest.mark.parametrize("rule", ["anp", "rnp"])
@pytest.mark.parametrize("front", [[], [nn.Conv2d(1, 8, 3, 1, 1)]], ids=["first", "after a convolution"])
def test_masks_are_learned_where_a_group_normalisation_comes_first(rule, front):
    made, options = RULES[rule]
    channels = 8 if front else 1
    norm = nn.GroupNorm(min(4, channels), channels)
    layers = [*front, norm, nn.ReLU(), nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    defender = defender_of(nn.Sequential(*layers, nn.Linear(8, 10)).eval(), torch.rand(20, 1, 8, 8))
    scores = made(None, **options).scores(defender)
    assert scores.shape == (len(defender.neurons),)
    assert np.isfinite(scores).all()


def test_unlearning_forgets_the_clean_images(defender):
    network = training_copy(defender)
    share = unlearn(network, defender, torch.Generator().manual_seed(0))
    assert share <= UNLEARNED
    assert not any(parameter.requires_grad for parameter in network.parameters())
    scores = RNP(None).scores(defender)
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores.max() > 0.5


@pytest.mark.slow
def test_greedy_prunes_what_costs_least_of_all(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0)
    observation, _ = env.reset(seed=0)
    alone, costs = env.unwrapped, []
    for unit in range(len(alone.session.prepared)):
        after = alone.session.peek([unit])
        costs.append((-after.acc, after.loss, unit))
    action, _ = GreedyACC(env, candidates=len(costs)).predict(observation)
    assert action == min(costs)[2]
    observation, _, _, _, info = env.step(action)
    assert info["acc"] >= alone.session.initial_figures.acc - 1e-9
    costs = []
    for unit in np.flatnonzero(alone.action_masks()[:-1]):
        after = alone.session.peek([unit])
        costs.append((-after.acc, after.loss, unit))
    again, _ = GreedyACC(env, candidates=len(costs)).predict(observation)
    assert again == min(costs)[2]


def run(policy: Any, env: gym.Env) -> BackdoorPruneEnv:
    """One episode."""
    run_episode(policy, env, env.reset(seed=0)[0])
    return env.unwrapped


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_policy_prunes_what_the_function_prunes(infected, name):
    kind, options = RULES[name]
    before = copy.deepcopy(infected.network.state_dict())
    repaired = kind.prune(infected.network, (infected.clean.images, infected.clean.labels), **options)
    assert all(torch.equal(value, before[key]) for key, value in infected.network.state_dict().items())
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None, score_samples=0)
    alone = run(kind(env, **options), env)
    prepared, kept = alone.session.prepared, alone.session.prepared.neuron_mask(alone.session.state.pruned)
    for layer in prepared.neurons.layers:
        module = repaired.get_submodule(layer.module)
        assert (((module.weight == 0) & (module.bias == 0)).numpy() == ~kept[layer.neurons]).all()
    again = kind.prune(infected.network, (infected.clean.images, infected.clean.labels), **options)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in repaired.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_auto_keeps_its_budget_and_budget_that_of_the_environment(infected, name):
    kind, options = RULES[name]
    clean = (infected.clean.images, infected.clean.labels)
    options = {**options, "threshold": "auto", "accuracy_budget": 0.03}
    before = evaluate(infected.network, *clean).acc
    assert before - evaluate(kind.prune(infected.network, clean, **options), *clean).acc <= 0.03 + 1e-9
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=0.03, score_samples=0)
    policy = kind(env, **{**options, "threshold": "budget"})
    alone = run(policy, env)
    assert alone.session.state.pruned.sum() > 0
    assert alone.session.initial_figures.acc - alone.session.figures.acc <= 0.03 + 1e-9


@pytest.mark.slow
def test_a_rule_looks_anew_at_each_model(infected, plain_infected):
    env = gym.make("BackdoorPrune-v0", infected=[infected, plain_infected], accuracy_budget=None, score_samples=0)
    rule = BNP(env, 1.0)
    for model in (infected, plain_infected, infected):
        observation, _ = env.reset(options={"infected": model})
        done = False
        while not done:
            action, _ = rule.predict(observation)
            observation, _, terminated, truncated, _ = env.step(int(action))
            done = terminated or truncated
        expected = BNP.prune(model.network, (model.clean.images, model.clean.labels), 1.0)
        zeros = sum(
            int(((m.weight == 0) & (m.bias == 0)).sum()) for m in expected.modules() if isinstance(m, nn.BatchNorm2d)
        )
        assert env.unwrapped.session.state.pruned.sum() == zeros > 0


@pytest.mark.slow
def test_rules_work_where_the_environment_is_in_another_process(infected_file):
    name = str(infected_file)
    options = {"infected": name, "accuracy_budget": None, "score_samples": 0}
    lengths = []
    for kind in (DummyVecEnv, SubprocVecEnv):
        env = kind([functools.partial(gym.make, "backdoor_gym:BackdoorPrune-v0", **options)])
        lengths.append(evaluate_policy(BNP(env, 1.0), env, 1, return_episode_rewards=True, warn=False)[1])
        env.close()
    assert lengths[0] == lengths[1]
    assert lengths[0][0] > 2


@pytest.mark.slow
def test_rules_work_in_a_vector_environment_and_on_groups(infected, plain_infected):
    def make():
        return gym.make("BackdoorPrune-v0", infected=[infected, plain_infected], residual="group", score_samples=0)

    env = DummyVecEnv([make, make])
    env.seed(0)
    rewards, lengths = evaluate_policy(BNP(env, 1.0), env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    assert len(rewards) == 4
    assert max(lengths) > 1


def test_a_threshold_may_be_all_or_nothing():
    scores = np.array([3.0, 3.0, 1.0, -np.inf])
    assert choose_threshold(scores, lambda pruned: 1.0, 0.02) == -np.inf  # those of minus infinity are never above it
    assert choose_threshold(scores, lambda pruned: 1.0 - 0.1 * pruned[0], 0.02) == 3.0
    assert choose_threshold(scores, lambda pruned: 1.0 - 0.1 * pruned[2], 0.02) == 1.0


def test_unusable_thresholds_and_images_are_refused(infected):
    for threshold in ("automatic", float("nan"), True):
        with pytest.raises(DataError, match="threshold"):
            BNP(None, threshold)
    clean = (infected.clean.images, infected.clean.labels)
    with pytest.raises(DataError, match="auto"):
        BNP.prune(infected.network, clean, "budget")
    with pytest.raises(DataError):
        BNP.prune(infected.network, (clean[0][0], clean[1]))
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=None, score_samples=0)
    observation, _ = env.reset(seed=0)
    with pytest.raises(DataError, match="accuracy budget"):
        BNP(env, "budget").predict(observation)
    with pytest.raises(DataError, match=r"BNP\(env\)"):
        BNP(None).predict(observation)
    with pytest.raises(DataError, match="two clean images"):
        RNP.prune(infected.network, (clean[0][:1], clean[1][:1]))
    assert CLP.published == BNP.published == EP.published == 3.0


@pytest.mark.parametrize("rule", [BNP, EP])
def test_a_rule_that_can_prune_nothing_says_so(rule):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    clean = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    with pytest.warns(UserWarning, match=f"{rule.__name__} prunes neurons with batch normalisation alone"):
        rule.prune(network, clean)
    env = gym.make("BackdoorPrune-v0", infected=InfectedModel.from_module(network, clean=clean))
    observation, _ = env.reset(seed=0)
    with pytest.warns(UserWarning, match="this network has none: nothing is pruned"):
        action, _ = rule(env).predict(observation)
    assert action == env.action_space.n - 1
