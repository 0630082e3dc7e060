"""Derivatives by masks against differences: of each kind of operation, from values that are kept and from none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.masking.backward import by_autograd, by_logits, mask_derivatives
from backdoor_gym.masking.operations import Operations
from backdoor_gym.neurons.finding import find_neurons

IMAGES = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """A layer of four neurons, and what a test does with them."""

    def __init__(self, behind, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.behind = nn.Conv2d(2, 4, 3, padding=1), behind
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.behind(self, F.softplus(self.first(x))).flatten(1))


def conv(**options):
    return nn.Conv2d(4, 4, 3, **options)


KINDS = {
    "convolution": (lambda m, x: m.c(x), {"c": conv()}),
    "stride": (lambda m, x: m.c(x), {"c": conv(stride=2)}),
    "stride that leaves a rest": (lambda m, x: m.c(x), {"c": nn.Conv2d(4, 4, 2, stride=3)}),
    "padding and dilation": (lambda m, x: m.c(x), {"c": conv(padding=2, dilation=2)}),
    "groups": (lambda m, x: m.c(x), {"c": conv(groups=2)}),
    "padding that reflects": (lambda m, x: m.c(x), {"c": conv(padding=1, padding_mode="reflect")}),
    "padding by name": (lambda m, x: m.c(x), {"c": conv(padding="same")}),
    "relu": (lambda m, x: F.relu(m.c(x) - 0.05), {"c": conv()}),
    "shortcut": (lambda m, x: m.c(x) + x, {"c": conv(padding=1)}),
    "broadcast sum": (lambda m, x: x + x.mean((2, 3), keepdim=True), {}),
    "twice the same": (lambda m, x: x + x, {}),
    "gate": (lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), {}),
    "pooling": (lambda m, x: F.max_pool2d(x, 2), {}),
    "normalisation": (lambda m, x: m.n(x), {"n": nn.GroupNorm(2, 4)}),
    "concatenation": (lambda m, x: torch.cat([x, m.c(x)], 1), {"c": conv(padding=1)}),
}


def quantity(logits):
    return (logits * torch.tensor([1.0, -2.0, 0.5])).square().sum()


@pytest.fixture(params=KINDS)
def network(request):
    """The traced network and the masks, in float64, one neuron half pruned."""
    behind, layers = KINDS[request.param]
    module = Written(behind, **layers).eval()
    module(IMAGES)
    neurons = find_neurons(module, IMAGES)
    masks = [torch.ones(layer.size, dtype=torch.float64) for layer in neurons.layers]
    masks[0][1] = 0.5  # at 0 the largest of a window has no derivative
    return neurons.graph.double(), masks


def differences(graph, masks):
    """Central ones, by each entry of each mask; exact up to the square of the step."""
    step, images, slopes = 1e-5, IMAGES.double(), []
    for layer, mask in enumerate(masks):
        for channel in range(len(mask)):
            values = []
            for change in (step, -step):
                moved = [each.clone() for each in masks]
                moved[layer][channel] += change
                values.append(quantity(graph(images, *moved)))
            slopes.append((values[0] - values[1]) / (2 * step))
    return torch.stack(slopes)


@pytest.mark.parametrize("keeps", ["nothing", "everything"])
def test_derivatives_are_what_small_changes_of_a_mask_make(network, keeps):
    graph, masks = network
    operations = Operations(graph)
    inputs = [node for node in operations.nodes if node.op == "placeholder"]
    values = dict(zip(inputs, (IMAGES.double(), *masks), strict=True))
    with torch.no_grad():
        for node in operations.nodes[len(values) :]:
            values[node] = operations.run(node, values.__getitem__)
        expected = differences(graph, masks)
    kept = values if keeps == "everything" else {inputs[0]: values[inputs[0]]}
    gradient = by_logits(quantity, values[operations.nodes[-1]])
    by_mask = mask_derivatives(operations, kept, dict(zip(inputs[1:], masks, strict=True)), gradient)
    derivatives = torch.cat([by_mask[mask] for mask in inputs[1:]]).double()
    torch.testing.assert_close(derivatives, expected, rtol=1e-4, atol=1e-5)
    whole = by_autograd(graph, IMAGES.double(), masks, [len(mask) for mask in masks], quantity)
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-7)


def test_by_the_logits():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert by_logits(quantity, logits).tolist() == [[2.0, 16.0, 1.5]]
    assert not logits.requires_grad
