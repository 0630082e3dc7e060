"""Batch normalisations that go into the convolution before them, and those that must not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.masking.folding import fold_norms
from backdoor_gym.neurons.tracing import trace

from ..conftest import settle

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """Two convolutions, two normalisations, and a forward that a test brings."""

    def __init__(self, forward, **options):
        super().__init__()
        torch.manual_seed(0)
        self.written = forward
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)

    def forward(self, x):
        return self.written(self, x).mean((2, 3))


def folded(forward, **options):
    network = Written(forward, **options).eval()
    if not options:
        settle(network)
    graph = trace(network, IMAGES)
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    fold = fold_norms(graph)
    torch.testing.assert_close(fold(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
    return [node.target for node in fold.graph.nodes if node.op == "call_module"]


def test_a_normalisation_goes_into_the_convolution_that_it_alone_reads():
    assert folded(lambda m, x: m.m(m.b(F.relu(m.n(m.a(x)))))) == ["a", "b"]
    assert folded(lambda m, x: m.n(m.a(x)), affine=False) == ["a"]


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        (lambda m, x: (lambda y: m.n(y) + y)(m.a(x)), ["a", "n"]),  # something else reads the convolution
        (lambda m, x: m.n(F.relu(m.a(x))), ["a", "n"]),  # a ReLU stands between
        (lambda m, x: m.n(m.b(m.n(m.a(x)))), ["a", "n", "b", "n"]),  # the normalisation is used twice
        (lambda m, x: m.m(m.b(m.n(m.b(m.a(x))))), ["a", "b", "n", "b", "m"]),  # the convolution is
    ],
)
def test_others_stay(forward, left):
    assert folded(forward) == left


def test_a_normalisation_by_the_batch_is_no_layer_and_still_computed():
    assert folded(lambda m, x: m.n(m.a(x)), track_running_stats=False) == ["a"]
