"""Every architecture of the zoo, and ways of writing a network that none of them has."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.analysis.mask_gradient import mask_gradient
from backdoor_gym.analysis.neuron_graph import neuron_graph
from backdoor_gym.errors import UntraceableError
from backdoor_gym.masking.cutting import cut_channels
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.neurons.finding import find_neurons

from ..tiny import CASES, tiny, tiny_images


def names_of(network):
    return [layer.name for layer in find_neurons(network).layers]


def check_masks(network, images, steps=4):
    """Logits under masks are those of the network with the masks written into its weights."""
    neurons = find_neurons(network, images)
    masked = MaskedNetwork(neurons, images)
    random = np.random.default_rng(0)
    whole = masked.logits(np.ones(len(neurons), dtype=bool))
    changed = False
    for _ in range(steps):
        mask = random.random(len(neurons)) > 0.2
        with torch.no_grad():
            expected = write_mask(network, neurons, mask)(images)
        found = masked.logits(mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(1), expected.argmax(1))
        changed |= not torch.equal(whole, expected)
    assert changed
    check_single_prunes(network, neurons, masked, images, random)
    return neurons


def check_single_prunes(network, neurons, masked, images, random):
    """One neuron after the other, each from what the ones before left; then the derivatives from what is kept."""
    masked.reset()
    mask = np.ones(len(neurons), dtype=bool)
    for neuron in random.permutation(len(neurons))[:4]:
        mask = mask.copy()
        mask[neuron] = False
        found = masked.logits(mask)
        masked.keep()
    with torch.no_grad():
        torch.testing.assert_close(found, write_mask(network, neurons, mask)(images), rtol=1e-4, atol=1e-4)
    for rows in (None, torch.tensor([1])):
        chosen = images if rows is None else images[rows]
        derivatives = masked.mask_gradient(mask, lambda logits: logits.square().sum(), rows)
        expected = mask_gradient(neurons, chosen, lambda logits: logits.square().sum(), mask)
        torch.testing.assert_close(derivatives, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
def test_masks_act_as_edits_and_channels_are_cut(name, options):
    network, images = tiny(name, **options), tiny_images()
    neurons = check_masks(network, images)
    mask = np.random.default_rng(1).random(len(neurons)) > 0.2
    for unit in neurons.units("group")[::3]:
        mask[unit] = False
    smaller = cut_channels(network, neurons, mask, images).network
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), write_mask(network, neurons, mask)(images), rtol=1e-3, atol=1e-3)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (smaller, network)]
    assert sizes[0] < 0.85 * sizes[1]


def test_dense_layers_read_the_neurons_of_all_before_at_their_places():
    network = tiny("densenet")
    neurons = find_neurons(network)
    layers = {layer.name: layer for layer in neurons.layers}
    third = layers["features.denseblock1.denselayer3.norm1"]
    block = "features.denseblock1.denselayer"
    assert [(feeder.module, feeder.rows[0]) for feeder in third.feeders] == [
        ("features.conv0", 0), (f"{block}1.conv2", 8), (f"{block}2.conv2", 12),
    ]  # fmt: skip
    # conv1 of the first layer reads norm1, whose channels it alone reads.
    names = [layer.name for layer in neurons.layers]
    assert [names[index] for index in layers[f"{block}1.conv1"].feeders[0].upstream] == [f"{block}1.norm1"]
    # Channel 9 of each later normalisation is channel 1 of the first layer: one group.
    together = next(unit for unit in neurons.units("group") if third.start + 9 in unit)
    assert {neurons.names[neuron] for neuron in together} == {f"{block}{index}.norm1[9]" for index in (2, 3)} | {
        "features.transition1.norm[9]"
    }


def test_neurons_of_transformers_are_heads_hidden_units_and_what_is_written_into_the_sum():
    layers = find_neurons(tiny("vit"), tiny_images()).layers
    inner = [("self_attention.in_proj", 2), ("self_attention.out_proj", 8), ("mlp.0", 32), ("mlp.3", 8)]
    expected = [(f"encoder.layers.encoder_layer_{index}.{name}", size) for index in range(2) for name, size in inner]
    assert [(layer.name, layer.size) for layer in layers] == [("conv_proj", 8), *expected]


def test_neurons_of_convnext_are_normalised_depthwise_channels_and_hidden_units():
    layers = find_neurons(tiny("convnext")).layers
    assert [(layer.name, layer.module, layer.axis) for layer in layers[:3]] == [
        ("features.0.0", "features.0.1", -1),
        ("features.1.0.block.0", "features.1.0.block.2", -1),
        ("features.1.0.block.3", "features.1.0.block.3", -1),
    ]
    assert any(layer.name == "features.1.0.block.5" for layer in layers)  # it writes into a sum


def test_gates_are_neurons_as_all_layers_are():
    names = names_of(tiny("mobilenet_v3_small"))
    assert {"features.1.block.1.fc1", "features.1.block.1.fc2"} <= set(names)


class Blocks(nn.Module):
    """A stem and a classifier around something that turns (n, 4, H, W) into (n, 4, ...)."""

    def __init__(self, inner):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = inner
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.inner(F.relu(self.stem(x))).flatten(2).mean(2))


class Lambda(nn.Module):
    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=4, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def attend(x):
    q, k, v = x.chunk(3, dim=-1)
    return (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v


WAYS = {
    "shared layer": (lambda m, x: m.a(F.relu(m.a(x))), {"a": conv()}, ["stem", "inner.a"]),
    "shared layer, two norms": (
        lambda m, x: m.n(m.a(F.relu(m.o(m.a(x))))),
        {"a": conv(), "n": nn.BatchNorm2d(4), "o": nn.BatchNorm2d(4)},
        ["stem", "inner.o", "inner.n"],
    ),
    "grouped": (lambda m, x: F.relu(m.a(x)), {"a": conv(groups=2)}, ["stem", "inner.a"]),
    "depthwise": (lambda m, x: m.b(F.relu(m.a(x))), {"a": conv(groups=4), "b": nn.Conv2d(4, 4, 1)}, ["stem", "inner.a", "inner.b"]),
    "concatenation": (lambda m, x: m.b(torch.cat([m.a(x), x], 1)), {"a": conv(), "b": conv(8)}, ["stem", "inner.a", "inner.b"]),
    "padded shortcut": (
        lambda m, x: (m.a(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))[:, :4],
        {"a": nn.Conv2d(4, 8, 3, 2, 1)},
        ["stem", "inner.a"],
    ),
    "chunks": (
        lambda m, x: torch.cat([m.a(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1), {"a": conv(2, 2)}, ["stem", "inner.a"]
    ),
    "shuffled channels": (
        lambda m, x: m.a(x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).flatten(1, 2)), {"a": conv()}, ["stem", "inner.a"]
    ),
    "gate": (
        lambda m, x: x * torch.sigmoid(m.b(F.relu(m.a(x.mean((2, 3)))))).view(x.size(0), -1, 1, 1),
        {"a": nn.Linear(4, 2), "b": nn.Linear(2, 4)},
        ["stem", "inner.a", "inner.b"],
    ),
    "gate by sizes": (
        lambda m, x: x * m.b(F.relu(m.a(x.mean((2, 3))))).sigmoid().view(x.size(0), x.size(1), 1, 1).expand_as(x),
        {"a": nn.Linear(4, 2), "b": nn.Linear(2, 4)},
        ["stem", "inner.a", "inner.b"],
    ),
    "swish": (lambda m, x: (lambda y: y * torch.sigmoid(y))(m.a(x)), {"a": conv()}, ["stem", "inner.a"]),
    "gated unit": (lambda m, x: F.silu(m.a(x)) * m.b(x), {"a": conv(), "b": conv()}, ["stem", "inner.a", "inner.b"]),
    "attention": (
        lambda m, x: m.d(
            F.scaled_dot_product_attention(*(one(x.flatten(2).transpose(1, 2)) for one in (m.a, m.b, m.c)))
        ).transpose(1, 2),
        {name: nn.Linear(4, 4) for name in "abcd"},
        ["stem", "inner.a", "inner.b", "inner.c", "inner.d"],  # of a single head
    ),
    "product attention": (
        lambda m, x: m.b(attend(m.a(x.flatten(2).mT))).mT,
        {"a": nn.Linear(4, 12), "b": nn.Linear(4, 4)},
        ["stem", "inner.a", "inner.b"],
    ),
    "group normalisation": (lambda m, x: F.relu(m.n(m.a(x))), {"a": conv(), "n": nn.GroupNorm(2, 4)}, ["stem", "inner.a"]),
    "instance normalisation": (
        lambda m, x: F.relu(m.n(m.a(x))), {"a": conv(), "n": nn.InstanceNorm2d(4, affine=True)}, ["stem", "inner.a"]
    ),
    "plain instance normalisation": (
        lambda m, x: F.relu(m.n(m.a(x))), {"a": conv(), "n": nn.InstanceNorm2d(4)}, ["stem", "inner.a"]
    ),
    "layer normalisation of images": (
        lambda m, x: F.relu(m.n(m.a(x))), {"a": conv(), "n": nn.LayerNorm([4, 8, 8])}, ["stem", "inner.a"]
    ),
    "PReLU": (lambda m, x: m.p(m.a(x)), {"a": conv(), "p": nn.PReLU(4)}, ["stem", "inner.a"]),
    "weights of a function": (lambda m, x: F.relu(F.conv2d(x, m.a.weight)), {"a": nn.Conv2d(4, 4, 1)}, ["stem", "inner.a"]),
    "layer normalisation between": (
        lambda m, x: m.b(F.relu(m.n(m.a(x.flatten(2).transpose(1, 2))))).transpose(1, 2),
        {"a": nn.Linear(4, 6), "n": nn.LayerNorm(6), "b": nn.Linear(6, 4)},
        ["stem", "inner.a", "inner.b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_a_network(way):
    torch.manual_seed(0)
    function, layers, expected = WAYS[way]
    network = Blocks(Lambda(function, **layers)).eval()
    neurons = check_masks(network, tiny_images())
    assert [layer.name for layer in neurons.layers] == expected
    graph = neuron_graph(network, neurons)
    assert graph.edge_links.max(initial=0) < len(neurons)
    mask = np.ones(len(neurons), dtype=bool)
    mask[neurons.layers[-1].start] = mask[neurons.layers[0].start + 1] = False
    edited = write_mask(network, neurons, mask)
    with torch.no_grad():
        torch.testing.assert_close(
            cut_channels(network, neurons, mask, tiny_images()).network(tiny_images()),
            edited(tiny_images()),
            rtol=1e-3,
            atol=1e-3,
        )


def test_concatenated_channels_are_linked_to_where_they_are_read():
    network = Blocks(Lambda(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=conv(4, 2), b=conv(6)))
    with torch.no_grad():
        network.inner.b.weight.zero_()
        network.inner.b.weight[0, 1] = 1  # channel 1 of a
        network.inner.b.weight[1, 2] = 1  # channel 0 of the stem
    neurons = find_neurons(network)
    graph = neuron_graph(network, neurons, similar=0)
    links = [tuple(link) for link in graph.edge_links.tolist() if link[1] >= 6]
    assert links == [(4 + 1, 6), (0, 7)]


class Standardised(nn.Conv2d):
    """Weights of mean zero and variance one for each channel."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class Constant(nn.Conv2d):
    """Gives something also where its weights are zero."""

    def forward(self, x):
        return super().forward(x) + 1


class Shifted(nn.Conv2d):
    """Weights that no zeros can be written into."""

    def forward(self, x):
        return F.conv2d(x, self.weight + 1, self.bias, padding=1)


def test_layers_with_a_forward_of_their_own_have_neurons_where_zero_weights_give_zeros():
    torch.manual_seed(0)
    for layer in (Standardised(4, 4, 3), Constant(4, 4, 3, padding=1)):
        neurons = check_masks(Blocks(nn.Sequential(layer, nn.ReLU())).eval(), tiny_images())
        assert [layer.name for layer in neurons.layers] == ["stem", "inner.0"]
    neurons = check_masks(Blocks(nn.Sequential(Shifted(4, 4, 3), nn.ReLU())).eval(), tiny_images())
    assert [layer.name for layer in neurons.layers] == ["stem"]
    assert "no zeros can be written" in next(
        account.reason for account in neurons.accounts if account.name == "inner.0"
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.linear = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.linear(F.relu(self.second(F.relu(self.first(x.flatten(1))))))


def test_weights_that_two_layers_share_are_one_layer_of_neurons():
    neurons = check_masks(Tied().eval(), torch.rand(4, 1, 2, 2))
    assert [layer.name for layer in neurons.layers] == ["first"]
    assert {name for part in neurons.layers[0].parts for name, _ in part.biases} == {"first.bias", "second.bias"}


@pytest.mark.parametrize(
    ("inner", "left", "words"),
    [
        (Lambda(lambda m, x: m.n(m.a(m.a(x))), a=conv(), n=nn.BatchNorm2d(4)), {"inner.a"}, "several times"),
        (nn.ConvTranspose2d(4, 4, 3), {"inner"}, "conv_transpose2d"),
    ],
)
def test_what_has_no_neurons_is_named_with_the_reason(inner, left, words):
    accounts = check_masks(Blocks(inner).eval(), tiny_images()).accounts
    reasons = {account.name: account.reason for account in accounts if account.reason and not account.is_output}
    assert reasons.keys() == left
    assert all(words in reason for reason in reasons.values())


def test_a_normalisation_after_itself_is_one_layer_of_neurons():
    neurons = check_masks(
        Blocks(Lambda(lambda m, x: m.n(m.n(m.a(x))), a=conv(), n=nn.BatchNorm2d(4))).eval(), tiny_images()
    )
    assert [layer.name for layer in neurons.layers] == ["stem", "inner.n"]


def test_attention_over_the_batch_is_refused():
    network = Blocks(Lambda(lambda m, x: m.t(x.flatten(2).mT).mT, t=nn.TransformerEncoderLayer(4, 1)))
    with pytest.raises(UntraceableError, match="how many images"):
        find_neurons(network, tiny_images())


class ByShape(nn.Module):
    """Pads odd images, as code for several image sizes does."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        height = x.shape[-2]
        if height % 2 or max(x.size(3) - 10, 0) > 0:
            x = F.pad(x, (0, 1, 0, 1))
        assert x.dim() == 4
        x = F.relu(self.conv(x))
        if x.shape[2] < 7:
            x = x + 1
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("size", [7, 8, 12])
def test_branches_on_shapes_are_taken_as_the_images_take_them(size):
    torch.manual_seed(0)
    network, images = ByShape().eval(), torch.rand(3, 1, size, size)
    neurons = find_neurons(network, images)
    mask = np.array([True, False, True, True])
    torch.testing.assert_close(MaskedNetwork(neurons, images).logits(mask), write_mask(network, neurons, mask)(images))


def test_branches_on_values_are_refused_also_with_images():
    network = Blocks(Lambda(lambda _, x: x if x.max() > 0 else -x))
    with pytest.raises(UntraceableError, match=r"layer inner .*values of tensors"):
        find_neurons(network, tiny_images())
