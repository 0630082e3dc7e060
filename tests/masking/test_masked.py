import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.analysis.mask_gradient import mask_gradient
from backdoor_gym.errors import DataError, UnknownNameError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.masking.memory_format import is_channels_last, select
from backdoor_gym.masking.sizes import Sizes
from backdoor_gym.networks.preprocessing import Preprocessed
from backdoor_gym.neurons.finding import find_neurons

from ..tiny import tiny, tiny_images

CASES = [
    ("resnet18", {}),
    ("preact_resnet18", {}),
    ("vgg16", {}),
    ("wrn16", {}),
    ("small_cnn", {"shape": "plain"}),
    ("small_cnn", {"shape": "residual"}),
    ("small_cnn", {"shape": "preact"}),
]


def images_for(name: str, count: int = 12) -> torch.Tensor:
    channels, size = (1, 8) if name == "small_cnn" else (3, 32)
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def edited_logits(network, neurons, mask, images):
    edited = write_mask(network, neurons, mask).to(memory_format=torch.channels_last)
    return edited(images.to(memory_format=torch.channels_last))


def close(found, expected):
    """Up to rounding, and with the same answers."""
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4) and torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("kept_bytes", "at_once"), [(1 << 30, 12), (1 << 30, 5), (20_000, 12)])
def test_masked_logits_are_those_of_the_edited_network(monkeypatch, network_of, name, options, kept_bytes, at_once):
    monkeypatch.setattr(Sizes, "images_at_once", at_once)
    network = network_of(name, **options)
    neurons = find_neurons(network)
    images = images_for(name)
    masked = MaskedNetwork(neurons, images, kept_bytes=kept_bytes)
    random = np.random.default_rng(0)
    mask = np.ones(len(neurons), dtype=bool)
    for step in range(12):
        candidate = mask.copy()
        candidate[random.choice(np.flatnonzero(mask), size=1 + step % 3, replace=False)] = False
        assert close(masked.logits(candidate), edited_logits(network, neurons, candidate, images))
        if step % 2:
            masked.keep()
            mask = candidate
    assert close(masked.logits(mask), edited_logits(network, neurons, mask, images))
    masked.reset()
    whole = np.ones(len(neurons), dtype=bool)
    assert close(masked.logits(whole), edited_logits(network, neurons, whole, images))


def test_only_what_lies_behind_a_pruned_neuron_is_computed(network_of):
    neurons = find_neurons(network_of("resnet18"))
    masked = MaskedNetwork(neurons, images_for("resnet18"))
    calls = []
    for name, module in masked._structure.graph.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    mask = np.ones(len(neurons), dtype=bool)
    mask[neurons.index("layer4.0.conv2[3]")] = False
    masked.logits(mask)
    assert calls == ["layer4.1.conv2"]  # of layer4.1.conv1, which reads the neuron, only the change


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("kept_bytes", "at_once"), [(1 << 30, 12), (1 << 30, 5), (20_000, 12)])
def test_derivatives_from_what_is_kept_are_those_of_the_graph(
    monkeypatch, network_of, name, options, kept_bytes, at_once
):
    monkeypatch.setattr(Sizes, "images_at_once", at_once)
    network = network_of(name, **options)
    neurons = find_neurons(network)
    images = images_for(name)
    masked = MaskedNetwork(neurons, images, kept_bytes=kept_bytes)
    random = np.random.default_rng(0)
    mask = np.ones(len(neurons), dtype=bool)
    rows = torch.tensor([7, 2, 3])
    for _ in range(3):
        mask = mask.copy()
        mask[random.choice(np.flatnonzero(mask), size=5, replace=False)] = False
        for chosen in (None, rows):
            quantity = lambda logits: F.cross_entropy(logits, torch.arange(len(logits)) % 10)  # noqa: E731
            found = masked.mask_gradient(mask, quantity, chosen)
            expected = mask_gradient(neurons, images if chosen is None else images[chosen], quantity, mask)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_activations_stay_channels_last(network_of, name, options):
    """In another order the first prune of a layer makes everything behind it several times as slow."""
    neurons = find_neurons(network_of(name, **options))
    masked = MaskedNetwork(neurons, images_for(name))
    mask = np.ones(len(neurons), dtype=bool)
    for pruned in ([0], [1, 2]):
        mask[pruned] = False
        masked.logits(mask)
        masked.keep()
    maps = [value for value in masked._parts[0]._base.values() if value.ndim == 4 and value.shape[1] > 1]
    assert maps
    assert all(is_channels_last(value) for value in maps)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_selection_has_the_order_of_the_whole(channels, axis):
    values = torch.rand(4, channels, 3, 3)
    index = torch.tensor([0]) if axis else torch.tensor([2, 0])
    expected = values.index_select(axis, index)
    assert torch.equal(select(values, axis, index), expected)
    found = select(values.contiguous(memory_format=torch.channels_last), axis, index)
    assert torch.equal(found, expected)
    assert is_channels_last(found)
    assert torch.equal(select(values.flatten(1), axis, index), values.flatten(1).index_select(axis, index))


def test_a_large_network_computes_some_images_after_the_others(monkeypatch, network_of):
    neurons = find_neurons(network_of("small_cnn", shape="plain"))
    images = images_for("small_cnn")
    calls = []
    neurons.graph.register_forward_hook(lambda _, read, __: calls.append(len(read[0])))
    quantity = lambda logits: F.cross_entropy(logits, torch.arange(len(logits)) % 10)  # noqa: E731
    whole = mask_gradient(neurons, images, quantity)
    monkeypatch.setattr("backdoor_gym.masking.sizes.PASS_BYTES", 5 * Sizes(neurons.graph, images[:1]).image_bytes)
    torch.testing.assert_close(mask_gradient(neurons, images, quantity), whole, rtol=1e-4, atol=1e-6)
    assert [count for count in calls if count > 1] == [12, 5, 5, 2, 5, 5, 2]  # the logits, then their derivatives
    masked, counts = MaskedNetwork(neurons, images), []
    for module in masked._structure.graph.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, read, __: counts.append(len(read[0])))
    mask = np.ones(len(neurons), dtype=bool)
    mask[: neurons.layers[0].size // 2] = False  # too many to be followed channel by channel
    masked.logits(mask)
    assert max(counts) == masked._structure.at_once < len(images)


def test_bfloat16_gives_the_answers_of_float32(infected):
    neurons = find_neurons(infected.network)
    clean = infected.clean
    exact, quick = (MaskedNetwork(neurons, clean.images, precision=one) for one in ("float32", "bfloat16"))
    assert quick.pass_bytes < 0.6 * exact.pass_bytes
    random = np.random.default_rng(0)
    mask = np.ones(len(neurons), dtype=bool)
    for _ in range(30):
        mask = mask.copy()
        mask[random.choice(np.flatnonzero(mask))] = False
        expected, found = exact.logits(mask), quick.logits(mask)
        assert found.dtype == torch.float32
        assert torch.equal(found.argmax(1), expected.argmax(1))
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        assert not torch.equal(found, expected)
        exact.keep()
        quick.keep()
    quantity = lambda logits: F.cross_entropy(logits, clean.labels)  # noqa: E731
    some = torch.arange(0, len(clean), 3)
    for rows, of_rows in (
        (None, quantity),
        (some, lambda logits: F.cross_entropy(logits, clean.labels[some])),
    ):
        expected, found = (network.mask_gradient(mask, of_rows, rows) for network in (exact, quick))
        assert np.corrcoef(expected, found)[0, 1] > 0.99


@pytest.mark.parametrize("name", ["resnet18", "small_cnn", "vit"])
@pytest.mark.parametrize("at_once", [12, 5])
def test_bfloat16_of_all_kinds_of_networks_and_of_parts_of_the_images(monkeypatch, name, at_once):
    torch.manual_seed(0)
    network = Preprocessed(lambda images: images * torch.tensor(0.5), tiny(name))
    images = tiny_images(12)
    neurons = find_neurons(network, images)
    exact = MaskedNetwork(neurons, images)
    monkeypatch.setattr("backdoor_gym.masking.plan.Sizes.images_at_once", 2 * at_once)
    quick = MaskedNetwork(neurons, images, precision="bfloat16")
    rows = torch.tensor([0, 4, 5, 11])
    for masked in (quick, quick.fork()):
        exact.reset()
        mask = np.ones(len(neurons), dtype=bool)
        for neuron in (3, len(neurons) - 1):
            mask = mask.copy()
            mask[neuron] = False
            expected, found = exact.logits(mask), masked.logits(mask)
            assert torch.equal(found.argmax(1), expected.argmax(1))
            assert (found - expected).abs().max() < 0.05 * expected.abs().max()
            for one in (exact, masked):
                one.keep()
            expected, found = (
                one.mask_gradient(mask, lambda logits: logits[:, 0].sum(), rows) for one in (exact, masked)
            )
            assert found.dtype == torch.float32
            assert np.corrcoef(expected, found)[0, 1] > 0.98


class OfFloats(nn.Module):
    """Computes in float64 in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.second(self.first(x).double().relu().float()).mean((2, 3))


def test_a_network_that_bfloat16_does_not_go_through_is_named():
    neurons = find_neurons(OfFloats().eval())
    images = images_for("small_cnn")
    assert len(MaskedNetwork(neurons, images)) == len(images)
    with pytest.raises(DataError, match="cannot be run in bfloat16"):
        MaskedNetwork(neurons, images, precision="bfloat16")
    with pytest.raises(UnknownNameError, match="bfloat16"):
        MaskedNetwork(neurons, images, precision="half")


def test_what_bfloat16_is_not_sure_of_is_computed_again(monkeypatch, network_of):
    neurons = find_neurons(network_of("small_cnn", shape="plain"))
    images = images_for("small_cnn")
    mask = np.ones(len(neurons), dtype=bool)
    mask[5] = False

    def logits(unsure):
        monkeypatch.setattr("backdoor_gym.masking.masked.ROUNDING", unsure)
        return MaskedNetwork(neurons, images, precision="bfloat16").logits(mask)

    expected, rounded = MaskedNetwork(neurons, images).logits(mask), logits(-1)
    first, second = rounded.topk(2).values.unbind(1)
    distance = (first - second) / rounded.abs().amax(1)
    least = distance.median().item()
    found = logits(least)
    assert close(found[distance <= least], expected[distance <= least])
    assert torch.equal(found[distance > least], rounded[distance > least])
    assert not close(rounded[distance <= least], expected[distance <= least])


class InPlace(nn.Module):
    """Overwrites its activations in every way that a network can."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.linear = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.first(x), inplace=True)
        y += x
        y = self.second(y).relu_()
        y.add_(x)
        return self.linear(F.max_pool2d(y, 2).view(y.size(0), -1))


def test_in_place_operations_do_not_spoil_what_is_kept():
    torch.manual_seed(0)
    network = InPlace().eval()
    neurons = find_neurons(network)
    images = images_for("small_cnn")
    masked = MaskedNetwork(neurons, images)
    for neuron in (17, 0, 9, 3):
        mask = np.ones(len(neurons), dtype=bool)
        mask[neuron] = False
        edited = write_mask(network, neurons, mask)
        with torch.no_grad():
            torch.testing.assert_close(masked.logits(mask), edited(images.clone()))


class Mixed(nn.Module):
    """What is named like a ReLU and is none, a sum with fewer channels, one with a number, and a size read of a value."""

    def __init__(self, act):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = act
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.token = nn.Parameter(torch.randn(1, 6, 1, 8))
        self.last = nn.Linear(6, 10)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        x = self.second(x) + x.mean(1, keepdim=True)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1, -1), x + 0.1 * x.size(2)], 2)
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("act", [nn.LeakyReLU(0.3), nn.GELU(), nn.ReLU()], ids=lambda act: type(act).__name__)
def test_names_shapes_and_sums_of_other_sizes_are_what_they_are(act):
    torch.manual_seed(0)
    network = Mixed(act).eval()
    images = torch.rand(5, 1, 8, 8)
    neurons = find_neurons(network, images)
    masked = MaskedNetwork(neurons, images)
    mask = np.ones(len(neurons), dtype=bool)
    for neuron in (4, 1):
        mask = mask.copy()
        mask[neuron] = False
        assert close(masked.logits(mask), edited_logits(network, neurons, mask, images))
        masked.keep()
        quantity = lambda logits: F.cross_entropy(logits, torch.arange(5))  # noqa: E731
        found = masked.mask_gradient(mask, quantity)
        torch.testing.assert_close(found, mask_gradient(neurons, images, quantity, mask), rtol=1e-3, atol=1e-6)
