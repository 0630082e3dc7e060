"""What ``speed.py`` compares with: what a user would write, CLP as published, and the least arithmetic there is to do."""

import copy
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from backdoor_gym.masking.export import write_mask
from backdoor_gym.neurons.channels import Channels, Kind
from backdoor_gym.neurons.layers import Neurons

#: Images of one forward and backward pass.
BATCH = 100


@torch.no_grad()
def masked_accuracy(network: nn.Module, neurons: Neurons, mask: np.ndarray, images: Tensor, labels: Tensor) -> float:
    """Rival (a): copy the network, write zeros into the channels, and run all images through all of it."""
    edited = write_mask(copy.deepcopy(network), neurons, mask, inplace=True)
    return (edited(images).argmax(1) == labels).float().mean().item()


def one_svd_a_channel(network: nn.Module, u: float) -> set[tuple[str, int]]:
    """Rival (b): CLP's published procedure, ``torch.svd`` of each channel's matrix, one after the other.

    Returns:
        The pruned channels: name of the convolution, and index.
    """
    pruned = set()
    conv = name = None
    with torch.no_grad():
        for found, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                conv, name = module, found
            elif isinstance(module, nn.BatchNorm2d):
                assert conv is not None
                assert name is not None
                assert module.running_var is not None
                sigma = module.running_var.sqrt()
                norms = []
                for channel in range(conv.out_channels):
                    kernel = conv.weight[channel].reshape(conv.in_channels, -1)
                    norms.append(torch.svd(kernel * (module.weight[channel] / sigma[channel]).abs())[1].max())
                bounds = torch.stack(norms)
                outstanding = bounds > bounds.mean() + u * bounds.std()
                pruned |= {(name, int(channel)) for channel in torch.nonzero(outstanding).flatten()}
    return pruned


def forward_backward(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A pass of training: the loss of all images and its derivatives by all weights."""
    for batch, targets in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        F.cross_entropy(network(batch), targets).backward()
    network.zero_grad(set_to_none=True)


class _Shapes(fx.Interpreter):
    """The shape of each value."""

    def __init__(self, neurons: Neurons) -> None:
        super().__init__(neurons.graph)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


def multiply_adds(neurons: Neurons, image: Tensor) -> tuple[float, np.ndarray]:
    """Multiply-adds of an image through the whole network, and those that a prune of each neuron makes necessary.

    The layers that read the pruned channel need that channel's part alone, those behind them all of theirs.

    Args:
        neurons: of the network.
        image: float32 (1, C, H, W).

    Returns:
        A number, and float64 (neurons,).
    """
    graph, channels = neurons.graph, Channels(neurons.graph)
    reader = _Shapes(neurons)
    with torch.no_grad():
        reader.run(image)
    work: dict[fx.Node, tuple[float, int]] = {}
    for node in graph.graph.nodes:
        if channels.kinds[node] is Kind.WEIGHTED:
            weight = graph.get_submodule(str(node.target)).weight
            assert isinstance(weight, Tensor)
            places = reader.shapes[node].numel() / weight.shape[0]
            work[node] = (weight.numel() * places, weight.shape[1])
    needed = np.zeros(len(neurons))
    for layer in neurons.layers:
        one_channel: dict[fx.Node, bool] = {
            node: True for node in graph.graph.nodes if node.op != "placeholder" and node.name == layer.node
        }
        total = 0.0
        for node in graph.graph.nodes:
            touched = [one_channel[source] for source in channels.inputs(node) if source in one_channel]
            if not touched or node in one_channel:
                continue
            if node in work:
                macs, inputs = work[node]
                total += macs / inputs if all(touched) else macs
                one_channel[node] = False
            else:
                one_channel[node] = all(touched) and channels.kinds[node] not in (Kind.OPAQUE, Kind.MIXING)
        needed[layer.neurons] = total
    return sum(macs for macs, _ in work.values()), needed


def gemm_rate(repeats: int = 5) -> float:
    """Multiply-adds a second in float32 of the better of a large matrix product and a 1 x 1 convolution, which is one."""
    size, pixels = 1024, 4096
    a, b = torch.rand(size, size), torch.rand(size, size)
    image = torch.rand(16, 512, 16, 16).contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(512, 512, 1, 1)
    rates: list[float] = []
    with torch.no_grad():
        for work, product in ((size**3, lambda: a @ b), (pixels * 512 * 512, lambda: F.conv2d(image, kernel))):
            product()
            rates.append(work / median(seconds(product) for _ in range(repeats)))
    return max(rates)


def seconds(work: Callable[[], object]) -> float:
    """That it takes once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
