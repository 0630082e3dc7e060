import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.analysis.mask_gradient import mask_gradient
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

#: Bytes that are kept, and images at once: little kept, all kept, and some images after the others.
KEPT = [(20_000, 12), *(pytest.param(1 << 30, count, marks=pytest.mark.slow) for count in (12, 5))]


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
@pytest.mark.parametrize(("kept_bytes", "at_once"), KEPT)
def test_masked_logits_are_those_of_the_edited_network(monkeypatch, network_of, name, options, kept_bytes, at_once):
    monkeypatch.setattr(Sizes, "images_at_once", at_once)
    network = network_of(name, **options)
    neurons = find_neurons(network)
    images = images_for(name)
    masked = MaskedNetwork(neurons, images, kept_bytes=kept_bytes)
    random = np.random.default_rng(0)
    mask = np.ones(len(neurons), dtype=bool)
    for step in range(6):
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
    for name, module in masked._plan.graph.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    mask = np.ones(len(neurons), dtype=bool)
    mask[neurons.index("layer4.0.conv2[3]")] = False
    masked.logits(mask)
    assert calls == ["layer4.1.conv2"]  # of layer4.1.conv1, which reads the neuron, only the change


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("kept_bytes", "at_once"), KEPT)
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
    for module in masked._plan.graph.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, read, __: counts.append(len(read[0])))
    mask = np.ones(len(neurons), dtype=bool)
    mask[: neurons.layers[0].size // 2] = False  # too many to be followed channel by channel
    masked.logits(mask)
    assert max(counts) == masked._plan.at_once < len(images)


@pytest.mark.parametrize("name", ["resnet18", "small_cnn", "vit"])
@pytest.mark.parametrize("at_once", [12, 5])
def test_parts_of_the_images_give_what_all_of_them_do(monkeypatch, name, at_once):
    torch.manual_seed(0)
    network = Preprocessed(lambda images: images * torch.tensor(0.5), tiny(name))
    images = tiny_images(12)
    neurons = find_neurons(network, images)
    whole = MaskedNetwork(neurons, images)
    monkeypatch.setattr("backdoor_gym.masking.plan.Sizes.images_at_once", at_once)
    parts = MaskedNetwork(neurons, images)
    rows = torch.tensor([0, 4, 5, 11])
    for masked in (parts, parts.fork()):
        whole.reset()
        mask = np.ones(len(neurons), dtype=bool)
        for neuron in (3, len(neurons) - 1):
            mask = mask.copy()
            mask[neuron] = False
            torch.testing.assert_close(masked.logits(mask), whole.logits(mask), rtol=1e-4, atol=1e-5)
            for network_under_mask in (whole, masked):
                network_under_mask.keep()
            expected, gradient = (
                each.mask_gradient(mask, lambda logits: logits[:, 0].sum(), rows) for each in (whole, masked)
            )
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


class OfFloats(nn.Module):
    """Computes in float64 in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.second(self.first(x).double().relu().float()).mean((2, 3))


def test_a_network_that_computes_in_float64_in_between():
    neurons = find_neurons(OfFloats().eval())
    images = images_for("small_cnn")
    masked, mask = MaskedNetwork(neurons, images), np.ones(len(neurons), dtype=bool)
    mask[2] = False
    torch.testing.assert_close(masked.logits(mask), neurons.graph(images, *neurons.layer_masks(mask, "cpu")))
    expected = mask_gradient(neurons, images, lambda logits: logits[:, 0].sum(), mask)
    torch.testing.assert_close(
        masked.mask_gradient(mask, lambda logits: logits[:, 0].sum()), expected, rtol=1e-4, atol=1e-6
    )
