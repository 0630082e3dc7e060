"""Labels of channels, the layers that they come from, classes, and heads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.neurons.channel_origin import classes, heads, is_depthwise, last_layers, sources
from backdoor_gym.neurons.channels import Channels, Kind, mask_channels
from backdoor_gym.neurons.labels import UNKNOWN, ZERO, Labels
from backdoor_gym.neurons.tracing import trace

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """Layers, and a forward that a test brings, before a classifier."""

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.written = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        return self.head(self.written(self, x).flatten(1))


def conv(inputs=3, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def channels_of(forward, **layers):
    network = Written(forward, **layers).eval()
    with torch.no_grad():
        network(IMAGES)
    return Channels(trace(network, IMAGES))


def node_of(channels, name):
    return next(node for node in channels.nodes if node.target == name)


def feeding(channels, name, **options):
    """The layers that a layer's inputs come from: name, normalisations passed, channels."""
    reached = sources(channels, channels.read(node_of(channels, name)), **options)
    return [
        (source.node.target, [norm.target for norm in source.norms], source.channels.tolist()) for source in reached
    ]


def test_a_chain_leads_back_over_a_normalisation():
    channels = channels_of(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(), n=nn.BatchNorm2d(4), b=conv(4))
    assert feeding(channels, "b") == [("a", ["n"], [0, 1, 2, 3])]
    assert feeding(channels, "b", stop={node_of(channels, "n")}) == [("n", [], [0, 1, 2, 3])]
    assert feeding(channels, "a") == []


def test_a_sum_leads_to_both_of_its_terms_and_puts_their_channels_into_one_class():
    channels = channels_of(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(), b=conv(), c=conv(4))
    assert [name for name, _, _ in feeding(channels, "c")] == ["a", "b"]
    numbers = classes(channels)
    first, second, third = (numbers[channels.made(node_of(channels, name))].tolist() for name in "abc")
    assert first == second
    assert not set(first) & set(third)
    assert len(set(first)) == 4


def test_a_concatenation_keeps_places():
    channels = channels_of(lambda m, x: m.c(torch.cat([m.b(x), m.a(x)], 1)), a=conv(), b=conv(3, 2), c=conv(6))
    assert feeding(channels, "c") == [("b", [], [0, 1, -1, -1, -1, -1]), ("a", [], [-1, -1, 0, 1, 2, 3])]


def test_channels_come_from_what_is_gated_and_not_from_the_gate():
    channels = channels_of(
        lambda m, x: (lambda y: m.c(y * torch.sigmoid(m.g(y.mean((2, 3), keepdim=True)))))(m.a(x)),
        a=conv(), g=nn.Conv2d(4, 4, 1), c=conv(4),
    )  # fmt: skip
    assert [name for name, _, _ in feeding(channels, "c")] == ["a"]


def test_movements_are_followed_and_mixtures_are_not():
    shuffled = channels_of(
        lambda m, x: m.b(m.a(x).view(len(x), 2, 2, 8, 8).transpose(1, 2).flatten(1, 2)), a=conv(), b=conv(4)
    )
    assert feeding(shuffled, "b") == [("a", [], [0, 2, 1, 3])]
    mixed = channels_of(lambda m, x: m.b(m.a(x).cumsum(1)), a=conv(), b=conv(4))
    assert feeding(mixed, "b") == []
    einsum = channels_of(lambda m, x: m.b(torch.einsum("nchw->nwhc", m.a(x))), a=conv(), b=nn.Linear(4, 4))
    assert feeding(einsum, "b") == [("a", [], [0, 1, 2, 3])]


def test_the_logits_come_from_every_layer_behind_which_none_stands():
    channels = channels_of(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(4))
    assert {node.target for node in last_layers(channels)} == {"head"}

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(), nn.Linear(256, 2), nn.Linear(256, 2)

        def forward(self, x):
            x = F.relu(self.a(x)).flatten(1)
            return self.b(x) + torch.tanh(self.c(x))

    assert {node.target for node in last_layers(Channels(trace(Two(), IMAGES)))} == {"b", "c"}


def test_a_depthwise_convolution_joins_classes_where_asked():
    channels = channels_of(lambda m, x: m.c(m.d(m.a(x))), a=conv(), d=conv(4, groups=4), c=conv(4, groups=2))
    assert [is_depthwise(channels, node_of(channels, name)) for name in "adc"] == [False, True, False]
    joined, apart = classes(channels, depthwise=True), classes(channels)
    read, made = channels.made(node_of(channels, "a")), channels.made(node_of(channels, "d"))
    assert joined[read].tolist() == joined[made].tolist()
    assert not set(apart[read]) & set(apart[made])


def test_heads_are_the_matrices_that_attention_multiplies_apart():
    def attention(m, x):
        x = x.flatten(2).mT
        q, k, v = m.qkv(x).view(len(x), 64, 3, 2, 3).permute(2, 0, 3, 1, 4)
        return m.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    channels = channels_of(attention, qkv=nn.Linear(3, 18), out=nn.Linear(6, 3))
    (layers,) = heads(channels)
    assert [node.target for node in layers] == ["qkv"]
    assert layers[node_of(channels, "qkv")].tolist() == [0, 0, 0, 1, 1, 1] * 3
    without = channels_of(lambda m, x: m.qkv(x.flatten(2).mT) @ torch.ones(18, 2), qkv=nn.Linear(3, 18))
    assert heads(without) == []


def test_uses_of_a_layer_are_found_by_its_weights():
    channels = channels_of(lambda m, x: m.a(F.relu(m.a(x))) + m.b(x), a=conv(3, 3), b=conv(3, 3))
    uses = channels.uses(node_of(channels, "a"))
    assert [node.target for node in uses] == ["a", "a"]
    assert channels.uses(uses[1]) == uses
    assert len(channels.uses(node_of(channels, "b"))) == 1


def test_kinds_say_what_a_node_does():
    channels = channels_of(
        lambda m, x: torch.sigmoid(m.n(m.a(x))) * F.softplus(m.a(x)) + m.a(x), a=conv(), n=nn.GroupNorm(2, 4)
    )
    kinds = [kind for kind in channels.kinds.values() if kind not in (Kind.WEIGHTED, Kind.MIXING)]
    assert kinds == [
        Kind.IMAGES, Kind.LIVE_NORM, Kind.GATE, Kind.CHANNELWISE, Kind.PRODUCT, Kind.SUM, Kind.ZERO_PRESERVING,
    ]  # fmt: skip


def test_labels_are_thin_and_tell_where_they_change():
    full = torch.tensor([5.0, 6, 7]).double().view(1, 3, 1).expand(2, 3, 4)
    labels = Labels.of(full)
    assert labels.thin.shape == (1, 3, 1)
    assert labels.along(1).tolist() == labels.along(-2).tolist() == [5, 6, 7]
    assert labels.along(2).tolist() == [UNKNOWN] * 4
    assert labels.steady([0, -1])
    assert not labels.steady([1])
    assert torch.equal(labels.full, full)
    assert labels.aligned(4).shape == (1, 1, 3, 1)
    padded = Labels.of(F.pad(full, (0, 0, 1, 0), value=ZERO))
    assert padded.along(1).tolist() == [ZERO, 5, 6, 7]
    assert Labels.unknown(torch.Size([2, 3])).along(1).tolist() == [UNKNOWN] * 3


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 4, 3, 3)), (-1, (2, 3, 4)), (1, (2, 4))])
def test_a_mask_is_put_on_the_channels_axis(axis, shape):
    values, mask = torch.ones(shape), torch.tensor([1.0, 0, 1, 0])
    kept = mask_channels(values, mask, axis).transpose(axis, -1).flatten(0, -2)
    assert (kept == mask).all()
    units = torch.tensor([1, -1, 0, 1])  # the second channel is of no unit
    kept = mask_channels(values, mask[:2], axis, units).transpose(axis, -1).flatten(0, -2)
    assert (kept == torch.tensor([0.0, 1, 1, 0])).all()
    assert mask_channels(values, None, axis) is values
