"""What is said of every layer and parameter: which are the output, which have no neurons and why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym import InfectedModel
from backdoor_gym.errors import UntraceableError
from backdoor_gym.neurons.finding import find_neurons

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Parameters, buffers and layers by name, and a forward that is given the module and the images."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.written = forward
        self.stem = nn.Conv2d(3, 6, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.written(self, x)

    def features(self, x):
        """(n, 6)."""
        return F.relu(self.stem(x)).mean((2, 3))


def weight(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def neurons_of(network):
    """The neurons; each parameter of two axes or more must be in a single account."""
    neurons = find_neurons(network.eval(), IMAGES)
    told = [name for account in neurons.accounts for name in account.parameters]
    assert sorted(told) == sorted(name for name, value in network.named_parameters() if value.ndim > 1)
    assert all(account.reason for account in neurons.accounts if account.units < max(1, account.channels))
    return neurons


def by_name(neurons):
    return {account.name: account for account in neurons.accounts}


def by_class(values, weights):
    return torch.stack([(values * row).sum(-1) for row in weights], 1)


def by_operation(x, kernel):
    return torch.ops.aten.convolution.default(x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


@pytest.mark.parametrize(
    ("logits", "shape"),
    [
        (lambda f, w: 10 * F.normalize(f, dim=1) @ w.t(), (3, 6)),
        (lambda f, w: f @ w + w[0], (6, 3)),
        (lambda f, w: (w @ f.t()).t(), (3, 6)),
        (lambda f, w: torch.bmm(f.unsqueeze(1), w.t().expand(len(f), -1, -1)).squeeze(1), (3, 6)),
        (lambda f, w: -((f.unsqueeze(1) - w) ** 2).sum(-1), (3, 6)),
        (lambda f, w: -(f.unsqueeze(1).expand(-1, 3, -1) - w.expand(len(f), -1, -1)).norm(dim=-1), (3, 6)),
        (lambda f, w: -((f.sort(1)[0].unsqueeze(1) - w) ** 2).sum(-1), (3, 6)),
        (lambda f, w: (f.unsqueeze(1) * w).min(-1)[0], (3, 6)),
        (by_class, (3, 6)),
        (lambda f, w: -torch.cdist(f, w), (3, 6)),
        (lambda f, w: F.cosine_similarity(f.unsqueeze(1), w.unsqueeze(0), dim=-1), (3, 6)),
        (lambda f, w: torch.inner(f, w), (3, 6)),
        (lambda f, w: torch.einsum("nd,cd->nc", f, w), (3, 6)),
        (lambda f, w: torch.tensordot(f, w, dims=1), (6, 3)),
        (lambda f, w: torch.addmm(w[0], f, w), (6, 3)),
        (lambda f, w: F.bilinear(f, f, w), (3, 6, 6)),
        (lambda f, w: F.linear(F.normalize(f), F.normalize(w)), (3, 6)),
    ],
)
@pytest.mark.parametrize("is_parameter", [True, False])
def test_a_product_that_gives_the_logits_is_the_output(logits, shape, is_parameter):
    network = Net(lambda m, x: logits(m.features(x), m.matrix))
    if is_parameter:
        network.matrix = weight(*shape)
    else:
        network.register_buffer("matrix", weight(*shape).detach())
    neurons = neurons_of(network)
    assert [layer.name for layer in neurons.layers] == ["stem"]
    assert (by_name(neurons)["matrix"].is_output, by_name(neurons)["matrix"].channels) == (True, 3)
    assert neurons.coverage == 1


@pytest.mark.parametrize(
    ("behind", "shape"),
    [
        (lambda y, w: y * w, (1, 3)),
        (lambda y, w: (y * w).log_softmax(1), (1, 3)),
        (lambda y, w: (lambda scaled: scaled - scaled.mean(1, keepdim=True))(y * w), (1, 3)),
        (lambda y, w: (torch.stack([y, y + 1], 1) * w).sum(1), (2, 3)),
        (lambda y, w: (y.view(-1, 3, 1, 1) * w).sum((2, 3)), (1, 1, 4, 4)),
        (lambda y, w: (w @ y.unsqueeze(1).expand(-1, 4, -1)).squeeze(1), (1, 4)),
    ],
)
def test_what_scales_the_classes_leaves_the_last_layer_the_output(behind, shape):
    neurons = neurons_of(
        Net(lambda m, x: behind(m.head(m.features(x)), m.scale), head=nn.Linear(6, 3), scale=weight(*shape))
    )
    assert [account.name for account in neurons.accounts if account.is_output] == ["head"]
    assert [layer.name for layer in neurons.layers] == ["stem"]


@pytest.mark.parametrize(
    ("middle", "shape", "word"),
    [
        (lambda f, w: (f.unsqueeze(1) * w).sum(-1), (10, 6), "mul"),
        (by_class, (10, 6), "mul"),
        (lambda f, w: torch.inner(f, w), (10, 6), "inner"),
        (lambda f, w: torch.linalg.multi_dot([f, w, torch.eye(10)]), (6, 10), "multi_dot"),
        (lambda f, w: torch.einsum("nd,cd->nc", f, w), (10, 6), "einsum"),
        (lambda f, w: F.conv_transpose1d(f.unsqueeze(2), w).flatten(1), (6, 10, 1), "conv_transpose1d"),
        (lambda f, w: F.embedding(f[:, 0].gt(0).long(), w), (5, 10), "embedding"),
    ],
)
def test_weights_beside_layers_are_named_with_their_channels(middle, shape, word):
    network = Net(lambda m, x: m.head(F.relu(middle(m.features(x), m.w))), head=nn.Linear(10, 3), w=weight(*shape))
    neurons = neurons_of(network)
    account = by_name(neurons)["w"]
    assert word in account.reason
    assert (account.units, account.channels) == (0, 10)
    assert neurons.left_out == [account]
    assert neurons.coverage == 6 / 16


def test_parameters_that_make_no_channels_are_named_and_leave_the_coverage_as_it_is():
    def forward(m, x):
        tokens = m.tokens(x).flatten(2).mT + m.positions
        return m.head(torch.cat([m.token.expand(len(x), -1, -1), m.norm(tokens)], 1)[:, 0])

    neurons = neurons_of(
        Net(
            forward, tokens=nn.Conv2d(3, 6, 4, 4), positions=weight(1, 4, 6), token=weight(1, 1, 6),
            norm=nn.LayerNorm((4, 6)), head=nn.Linear(6, 3), spare=nn.Linear(6, 6),
        )
    )  # fmt: skip
    reasons = {account.name: (account.channels, account.reason.split()[0]) for account in neurons.left_out}
    assert reasons == {
        "positions": (0, "add"),
        "token": (0, "cat"),
        "norm": (0, "it"),
        "spare": (0, "no"),
        "stem": (0, "no"),
    }
    assert neurons.coverage == 1


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            Net(lambda m, x: m.head(m.inner(x.unsqueeze(1)).mean((2, 3, 4))), inner=nn.Conv3d(1, 6, 3), head=nn.Linear(6, 3)),
            "inner .*conv3d",
        ),
        (
            Net(lambda m, x: m.head(m.inner(x.flatten(2))[0][:, -1]), inner=nn.LSTM(64, 6, batch_first=True), head=nn.Linear(6, 3)),
            "inner.weight_ih_l0 .*lstm",
        ),
        (
            Net(lambda m, x: m.head(by_operation(x, m.stem.weight).mean((2, 3))), head=nn.Linear(6, 3)),
            "stem .*convolution",
        ),
        (Net(lambda m, x: m.a(x.flatten(1)) + m.b(x.flatten(1)), a=nn.Linear(192, 3), b=nn.Linear(192, 3)), "a and b, give"),
        (Net(lambda m, x: x.flatten(1) @ m.w, w=weight(192, 3)), "w, gives the logits"),
    ],
)  # fmt: skip
def test_a_network_without_neurons_is_told_which_layers_it_has(network, words):
    with pytest.raises(UntraceableError, match=words):
        find_neurons(network, IMAGES)


@pytest.mark.parametrize("tie", ["weight", "layer"])
def test_tied_weights_are_one_layer_that_is_used(tie):
    network = Net(lambda m, x: m.head(m.b(F.relu(m.a(m.stem(x)))).mean((2, 3))))
    network.a, network.b, network.head = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
    if tie == "layer":
        network.b = network.a
    else:
        network.b.weight = network.a.weight
    neurons = neurons_of(network)
    assert not neurons.notes
    assert [account.name for account in neurons.accounts] == ["stem", "a", "head"]


def test_a_layer_whose_weights_a_transposed_one_reads_too_is_named_as_the_user_calls_it():
    network = Net(
        lambda m, x: m.head(F.linear(F.relu(m.a(m.features(x))), m.a.weight.t())),
        a=nn.Linear(6, 9),
        head=nn.Linear(6, 3),
    )
    account = by_name(neurons_of(network))["a"]
    assert (account.channels, account.units, account.reason) == (15, 0, "another operation reads its weights too")


def test_names_are_those_of_the_network_that_the_user_gave():
    def forward(m, x):
        return {"logits": m.head(m.features(x)) if m.is_whole or x.sum() > 0 else None}

    network = Net(forward, head=nn.Linear(6, 3), spare=nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    network.network, network.is_whole = nn.Linear(6, 6), True
    infected = InfectedModel.from_module(network, clean=(IMAGES, torch.arange(12) % 3))
    neurons = find_neurons(infected.network, IMAGES)
    assert [account.name for account in neurons.accounts] == ["stem", "head", "network", "spare"]
    assert neurons.notes[0] == "No recorded pass reads the weights of network, spare."
    assert neurons.notes[1].startswith("The weights of spare are computed")
    infected.network.network.is_whole = False
    with pytest.raises(UntraceableError, match="the network's own forward reads the values"):
        find_neurons(infected.network, IMAGES)


def test_normalisation_by_the_batch_is_said_whatever_statistics_there_are():
    def forward(m, x):
        x = m.stem(x)
        return m.head(F.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True).mean((2, 3)))

    notes = neurons_of(Net(forward, norm=nn.BatchNorm2d(6), head=nn.Linear(6, 3))).notes
    assert any("normalisation norm takes the statistics of the batch" in note for note in notes)
