"""Seconds of CLP's bounds on ResNet-18: all channels in one batch against one SVD a channel, in turn in one run.

Twice at width 64: as this package writes it, and as CLP's authors do, whose blocks make their last ReLU while they run. Of that
one, the channels that ``clp.prune`` zeroes without any image must be those of the published procedure, at u = 2 and 3.

    python benchmarks/clp_speed.py

The result goes to ``benchmarks/results/clp_speed.json``.
"""

import copy
import itertools
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.baselines import clp
from backdoor_gym.networks import build
from backdoor_gym.neurons.finding import find_neurons

RESULT = Path(__file__).parent / "results" / "clp_speed.json"
ROUNDS = 7


def one_svd_a_channel(network: nn.Module) -> list[torch.Tensor]:
    """The published procedure: ``torch.svd`` of each channel's matrix, one after the other."""
    bounds = []
    conv = None
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            sigma = module.running_var.sqrt()
            found = []
            for channel in range(conv.out_channels):
                kernel = conv.weight[channel].reshape(conv.in_channels, -1)
                found.append(torch.svd(kernel * (module.weight[channel] / sigma[channel]).abs())[1].max())
            bounds.append(torch.stack(found))
    return bounds


class Block(nn.Module):
    """A residual block whose last activation is made while it runs."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
            norm.running_var.copy_(torch.rand(norm.num_features, generator=random) + 0.5)
            norm.weight.copy_(torch.rand(norm.num_features, generator=random) + 0.5)
            norm.bias.copy_(torch.rand(norm.num_features, generator=random))
            norm.weight[torch.randperm(norm.num_features, generator=random)[:2]] *= 4
    return network


@torch.no_grad()
def published(network: nn.Module, u: float) -> nn.Module:
    """A copy without the channels above mean + u * deviation of their layer."""
    pruned = copy.deepcopy(network)
    norms = (module for module in pruned.modules() if isinstance(module, nn.BatchNorm2d))
    for norm, bounds in zip(norms, one_svd_a_channel(network), strict=True):
        outliers = bounds > bounds.mean() + u * bounds.std()
        norm.weight[outliers] = norm.bias[outliers] = 0
    return pruned


def zeroed(network: nn.Module) -> list[list[int]]:
    """The channels of each batch normalisation whose weight and bias are zero."""
    norms = (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    return [torch.nonzero((norm.weight == 0) & (norm.bias == 0)).flatten().tolist() for norm in norms]


@torch.no_grad()
def main() -> None:
    rows = []
    networks = {
        "resnet18, width 16": build("resnet18", 10, 3, width=16),
        "resnet18, width 64": build("resnet18", 10, 3, width=64),
        "as CLP's authors write it, width 64": with_outliers(as_the_authors_write_it(64)),
    }
    for threads, name in itertools.product((1, torch.get_num_threads()), networks):
        torch.set_num_threads(threads)
        network = networks[name].eval()
        neurons = find_neurons(network)
        slow, fast = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            expected = one_svd_a_channel(network)
            slow.append(time.perf_counter() - start)
            start = time.perf_counter()
            found = uclc(network, neurons)
            fast.append(time.perf_counter() - start)
        # Modules come in the order of their definition, layers in that of their use: compare as sets of layers.
        error = max(
            min((a - b).abs().max().item() for b in found if b.shape == a.shape) for a in (e.double() for e in expected)
        )
        ratio = median(a / b for a, b in zip(slow, fast, strict=True))
        rows.append(
            {
                "threads": threads,
                "network": name,
                "channels": len(neurons),
                "seconds_svd": median(slow),
                "seconds_batched": median(fast),
                "ratio": ratio,
                "largest_difference": error,
            }
        )
        print(json.dumps(rows[-1]))
    theirs = networks["as CLP's authors write it, width 64"]
    same = {f"{u:g}": zeroed(clp.prune(theirs, u=u)) == zeroed(published(theirs, u)) for u in (2.0, 3.0)}
    counts = {f"{u:g}": sum(map(len, zeroed(published(theirs, u)))) for u in (2.0, 3.0)}
    start = time.perf_counter()
    clp.prune(theirs)
    whole = time.perf_counter() - start
    print(f"the same channels as published: {same}, of {counts}; clp.prune without images: {whole:.2f} s")
    RESULT.parent.mkdir(exist_ok=True)
    record = {
        "rounds": ROUNDS,
        "rows": rows,
        "same_channels_as_published": same,
        "channels": counts,
        "seconds_of_prune": whole,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not all(same.values()):
        raise SystemExit("other channels than those of the published procedure")


if __name__ == "__main__":
    main()
