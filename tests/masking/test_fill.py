"""Pruned neurons that give their clean mean: as constants of masks, in written networks, and in derivatives."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.analysis.mask_gradient import mask_gradient
from backdoor_gym.errors import DataError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.fill import fill_values
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.masking.sizes import Sizes
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.neurons.channels import Filled
from backdoor_gym.neurons.finding import find_neurons

from .test_masked import CASES, close, images_for

IMAGES = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
QUANTITY = lambda logits: F.cross_entropy(logits, torch.arange(len(logits)) % 3)  # noqa: E731


class Net(nn.Module):
    """A first layer ``a``, perhaps with a BN, something after it, and a linear layer behind."""

    def __init__(self, behind=F.relu, bias=True, norm=False, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.behind = nn.Conv2d(3, 6, 3, bias=bias), behind
        self.n = nn.BatchNorm2d(6) if norm else nn.Identity()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        x = self.n(self.a(x))
        return self.head((self.behind(self, x) if hasattr(self, "c") else self.behind(x)).flatten(1))


def made(behind=F.relu, **options):
    """A network, its neurons, and what its first layer gives."""
    network = Net(behind, **options).eval()
    network(IMAGES)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.uniform_(-0.3, 0.3)
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    with torch.no_grad():
        values = network.n(network.a(IMAGES))
    return network, find_neurons(network, IMAGES), values


def mean(values):
    return values.mean((0, 2, 3))


def test_another_kind_is_refused():
    _, neurons, _ = made()
    for kind in ("avg", None, 1, []):
        with pytest.raises(DataError, match='"zero" or "mean"'):
            fill_values(neurons, IMAGES, kind)
    assert not fill_values(neurons, IMAGES, "zero").any()


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu and max pooling": lambda x: F.max_pool2d(F.relu(x), 2),
    "max pooling and relu": lambda x: F.relu(F.max_pool2d(x, 3, 1, 1)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_follows_sees_the_mean_behind_an_activation_with_an_inverse(name, norm):
    behind = ACTIVATIONS[name]
    _, neurons, values = made(behind, norm=norm)
    fill = fill_values(neurons, IMAGES)
    assert (fill.shape, fill.dtype) == ((6,), torch.float32)
    seen = behind(fill.view(1, -1, 1, 1).expand(1, -1, 6, 6))
    torch.testing.assert_close(mean(seen), mean(behind(values)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("behind", [F.gelu, F.silu, lambda x: F.relu(x) + x, lambda x: x.mean((2, 3)) - 1])
def test_the_mean_of_the_neuron_itself_elsewhere(behind):
    _, neurons, values = made(behind)
    torch.testing.assert_close(fill_values(neurons, IMAGES), mean(values), rtol=1e-4, atol=1e-5)


def test_means_are_over_all_images_in_batches(monkeypatch):
    _, neurons, _ = made(norm=True)
    whole = fill_values(neurons, IMAGES)
    monkeypatch.setattr(Sizes, "images_at_once", 7)
    torch.testing.assert_close(fill_values(neurons, IMAGES), whole)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 3)

    def forward(self, x):
        return self.head(F.relu(self.a(F.relu(self.a(x)))).flatten(1))


class Scaled(nn.Module):
    """A bias that is computed from a parameter: what is written there is not what comes out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(4)), nn.Linear(144, 3)

    def forward(self, x):
        return self.head(F.relu(F.conv2d(x, self.a.weight, 2 * self.b)).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(24, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x.flatten(2).reshape(len(x), 8, 24))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


NOT_HELD = {"no bias": lambda: Net(bias=False), "used twice": Twice, "computed bias": Scaled}


@pytest.mark.parametrize("name", NOT_HELD)
def test_where_a_constant_cannot_be_held_the_fill_is_zero(name):
    network = NOT_HELD[name]().eval()
    network(IMAGES)
    neurons = find_neurons(network, IMAGES)
    fill = fill_values(neurons, IMAGES)
    assert not fill.any()
    same_everywhere(network, neurons, fill, IMAGES)


def test_heads_are_zeros():
    network = Attention().eval()
    neurons = find_neurons(network, IMAGES)
    fill = fill_values(neurons, IMAGES)
    (heads,) = (layer for layer in neurons.layers if layer.size == 2)
    assert not fill[heads.neurons].any()
    same_everywhere(network, neurons, fill, IMAGES)


@torch.no_grad()
def same_everywhere(network, neurons, fill, images, seed=0):
    """The masked network, step by step, its graph and the written network give the same logits."""
    masked = MaskedNetwork(neurons, images, fill=fill)
    random = np.random.default_rng(seed)
    mask = np.ones(len(neurons), dtype=bool)
    for step in range(6):
        candidate = mask.copy()
        left = np.flatnonzero(mask)
        candidate[random.choice(left, size=min(1 + step % 3, len(left)), replace=False)] = False
        written = write_mask(network, neurons, candidate, fill=fill)
        assert type(written) is type(network)
        assert written.state_dict().keys() == network.state_dict().keys()
        assert close(masked.logits(candidate), written(images))
        if step % 2:
            masked.keep()
            mask = candidate
    twin = masked.fork()
    assert close(twin.logits(mask), write_mask(network, neurons, mask, fill=fill)(images))
    masked.reset()
    assert close(masked.logits(np.ones(len(neurons), dtype=bool)), network(images))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_logits_are_those_of_the_written_network(network_of, name, options):
    network, images = network_of(name, **options), images_for(name)
    neurons = find_neurons(network)
    fill = fill_values(neurons, images)
    assert fill.any()
    same_everywhere(network, neurons, fill, images)


def block(m, x):
    return F.relu(m.d(F.relu(m.c(x))) + x)


KINDS = {
    "conv and relu": {},
    "conv without a bias": {"bias": False},
    "bn and relu": {"norm": True, "bias": False},
    "gelu": {"behind": F.gelu, "norm": True},
    "linear": {
        "behind": lambda m, x: F.relu(m.c(F.relu(x).flatten(1))),
        "c": nn.Linear(216, 7),
    },
    "residual": {
        "behind": block,
        "c": nn.Conv2d(6, 5, 3, padding=1),
        "d": nn.Sequential(nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
    },
    "vectors": {
        "behind": lambda m, x: m.d(F.gelu(m.c(x.flatten(2).transpose(1, 2)))).mean(1),
        "c": nn.Linear(6, 9),
        "d": nn.Linear(9, 4),
    },
    "group norm": {"behind": lambda m, x: F.relu(m.c(x)), "c": nn.GroupNorm(2, 6)},
    "several tensors": {"behind": lambda m, x: torch.cat(m.c(x).chunk(2, 1)[::-1], 1), "c": nn.Conv2d(6, 6, 1)},
}


@pytest.mark.parametrize("name", KINDS)
def test_masked_and_written_networks_are_alike(name):
    network, neurons, _ = made(**KINDS[name])
    same_everywhere(network, neurons, fill_values(neurons, IMAGES), IMAGES)


@torch.no_grad()
def differences(neurons, mask, fill):
    """Central ones, by each neuron's mask, in float64: what a small step away from its constant adds."""
    graph, images, slopes, step = neurons.graph.double(), IMAGES.double(), [], 1e-6
    weights = torch.from_numpy(mask).double()
    for neuron in range(len(neurons)):
        values = []
        for change in (step, -step):
            moved = weights.clone()
            moved[neuron] += change
            masks = [Filled(moved[layer.neurons], fill.double()[layer.neurons]) for layer in neurons.layers]
            values.append(QUANTITY(graph(images, *masks)))
        slopes.append((values[0] - values[1]) / (2 * step))
    neurons.graph.float()
    return torch.stack(slopes).float()


@pytest.mark.parametrize("name", KINDS)
def test_derivatives_are_the_first_order_effect_of_the_constant(name):
    _, neurons, _ = made(**KINDS[name])
    fill = fill_values(neurons, IMAGES)
    mask = np.ones(len(neurons), dtype=bool)
    for pruned in ([], [1, 3]) if fill.any() else ([],):  # a zero before a ReLU has two slopes
        mask[pruned] = False
        expected = differences(neurons, mask, fill)
        bound = 1e-4 * expected.abs().max().item()
        of_graph = mask_gradient(neurons, IMAGES, QUANTITY, mask, fill)
        torch.testing.assert_close(of_graph, expected, rtol=1e-3, atol=bound)
        masked = MaskedNetwork(neurons, IMAGES, fill=fill)
        torch.testing.assert_close(masked.mask_gradient(mask, QUANTITY), expected, rtol=1e-3, atol=bound)
        rows = torch.tensor([3, 11, 5])
        of_rows = masked.mask_gradient(mask, QUANTITY, rows)
        torch.testing.assert_close(
            of_rows, mask_gradient(neurons, IMAGES[rows], QUANTITY, mask, fill), rtol=1e-3, atol=1e-5
        )


def test_a_derivative_is_value_less_constant_times_that_by_the_value():
    network, neurons, values = made(norm=True)
    fill = fill_values(neurons, IMAGES)
    values = values.requires_grad_()
    (by_value,) = torch.autograd.grad(QUANTITY(network.head(F.relu(values).flatten(1))), [values])
    expected = (by_value * (values - fill.view(1, -1, 1, 1))).sum((0, 2, 3)).detach()
    torch.testing.assert_close(mask_gradient(neurons, IMAGES, QUANTITY, None, fill), expected, rtol=1e-3, atol=1e-6)


def test_a_network_of_ones_own_with_preprocessing():
    network, _, _ = made(norm=True)
    infected = InfectedModel.from_module(network, (IMAGES, torch.arange(20) % 3))
    neurons = find_neurons(infected.network, IMAGES)
    same_everywhere(infected.network, neurons, fill_values(neurons, IMAGES), IMAGES)
