"""What ``speed.py`` measures on, and compares with: a user's way, CLP as published, and the least arithmetic there is to do."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import backdoor_gym
from backdoor_gym.analysis.bn_evidence import BNEvidence, Correction
from backdoor_gym.analysis.evidence import Evidence
from backdoor_gym.analysis.suspected_target import SuspectedTarget
from backdoor_gym.analysis.trigger_inversion import InvertedTrigger
from backdoor_gym.benchmarking.resuming import Row
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.masking.export import write_mask
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.networks import build
from backdoor_gym.neurons.channels import Channels, Kind
from backdoor_gym.neurons.layers import Neurons
from backdoor_gym.session.prepared_model import PreparedModel

HERE = Path(__file__).parent
DIGITS, NARROW, WIDE, AUTHORS = "digits-train/140", "resnet18-16", "resnet18-64", "resnet18-64 of CLP's authors"
#: Images, prunes of an episode, and rounds; other networks have those of the digits.
SIZES = {DIGITS: (200, 24, 7), NARROW: (500, 16, 5), WIDE: (500, 8, 3), AUTHORS: (0, 0, 7)}
#: Images of one forward and backward pass.
BATCH = 100


def seconds(work: Callable[[], object]) -> float:
    """That it takes once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Clock:
    """Seconds spent in methods, by kind; what one of them calls of another is counted once."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}
        self._inside = 0

    def watch(self, owner: type, name: str, kind: str) -> None:
        """Count the time in a method from now on."""
        method = getattr(owner, name)
        self.taken.setdefault(kind, 0.0)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inside += 1
            answers: list[Any] = []
            taken = seconds(lambda: answers.append(method(*arguments, **options)))
            self._inside -= 1
            if not self._inside:
                self.taken[kind] += taken
            return answers[0]

        setattr(owner, name, timed)


def sizes_of(network: str) -> tuple[int, int, int]:
    return SIZES.get(network, SIZES[DIGITS])


def model_of(network: str) -> InfectedModel:
    """One of the three, or any other by name."""
    if network not in (NARROW, WIDE):
        return backdoor_gym.load_infected(network)
    narrow = backdoor_gym.load_infected(str(HERE / "models" / "resnet18-badnets.safetensors"))
    if network == NARROW:
        return narrow
    torch.manual_seed(0)
    wide = build("resnet18", num_classes=10, in_channels=3, width=64)
    for module in wide.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of the next batch
    with torch.no_grad():
        wide.train()(narrow.clean.images[:100])
    return InfectedModel.from_module(wide.eval(), (narrow.clean.images, narrow.clean.labels), name=WIDE)


def environment(network: str, images: int) -> BackdoorPruneEnv:
    """An environment of it, an episode begun."""
    model = model_of(network)
    env = BackdoorPruneEnv(model, accuracy_budget=None, score_samples=0, clean_samples=images)
    if network == WIDE:
        read(env.generator.get(model))
    env.reset(seed=0)
    return env


def read(prepared: PreparedModel) -> None:
    """A pattern in place of what a search, which takes minutes, would find."""
    images = prepared.clean.images
    others = images[:100][prepared.clean.labels[:100] != 0].contiguous(memory_format=torch.channels_last)
    pattern = 0.1 * torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0))
    triggered = (others + pattern).clamp(0, 1).contiguous(memory_format=torch.channels_last)
    bn = BNEvidence(
        Correction(),
        images,
        SuspectedTarget(0, 0.5, 0.0, 0.1, {}, {}),
        InvertedTrigger(0, ("addition",), others, triggered, 0.05, -0.5, 0.5),
    )
    prepared.__dict__["evidence"] = Evidence(bn, None)


def ratio(ours: list[float], rivals: list[float]) -> Row:
    """Medians, and the median of the ratios of what ran beside each other."""
    ratios = [rival / our for our, rival in zip(ours, rivals, strict=True)]
    rounded = [round(value, 2) for value in ratios]
    return {"seconds": median(ours), "rival_seconds": median(rivals), "ratio": median(ratios), "ratios": rounded}


@torch.no_grad()
def masked_accuracy(network: nn.Module, neurons: Neurons, mask: np.ndarray, images: Tensor, labels: Tensor) -> float:
    """Rival (a): copy the network, write zeros into the channels, and run all images through all of it."""
    edited = write_mask(copy.deepcopy(network), neurons, mask, inplace=True)
    return (edited(images).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def one_svd_a_channel(network: nn.Module, u: float) -> list[tuple[str, list[int]]]:
    """Rival (b): CLP's published procedure, ``torch.svd`` of each channel's matrix, one after the other.

    Returns:
        Of each batch normalisation the name of its convolution, and the channels above mean + u * deviation of the layer.
    """
    outliers, conv, conv_name = [], None, ""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            conv, conv_name = module, name
        elif isinstance(module, nn.BatchNorm2d):
            assert conv is not None
            assert module.running_var is not None
            sigma = module.running_var.sqrt()
            norms = []
            for channel in range(conv.out_channels):
                kernel = conv.weight[channel].reshape(conv.in_channels, -1)
                norms.append(torch.svd(kernel * (module.weight[channel] / sigma[channel]).abs())[1].max())
            bounds = torch.stack(norms)
            outliers.append((conv_name, torch.nonzero(bounds > bounds.mean() + u * bounds.std()).flatten().tolist()))
    return outliers


class Block(nn.Module):
    """A residual block whose last activation is made while it runs, as CLP's authors write it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.inner(x) + self.around(x))


def as_the_authors_write_it(width: int) -> nn.Module:
    """ResNet-18 in the manner of CLP's repository."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        for stride in (1 if outputs == width else 2, 1):
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


@torch.no_grad()
def with_outliers(network: nn.Module) -> nn.Module:
    """BN statistics as after training, and some channels that stand out."""
    random = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values, least in ((norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, 0.0)):
                values.copy_(torch.rand(norm.num_features, generator=random) + least)
            norm.weight[torch.randperm(norm.num_features, generator=random)[:2]] *= 4
    return network


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
