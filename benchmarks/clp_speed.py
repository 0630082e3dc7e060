"""Seconds of CLP's bounds on ResNet-18: all channels in one batch against one SVD a channel, in turn in one run.

    python benchmarks/clp_speed.py

The result goes to ``benchmarks/results/clp_speed.json``.
"""

import itertools
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from backdoor_gym.graph.uclc import uclc
from backdoor_gym.pruning.neurons import find_neurons
from backdoor_gym.zoo.architectures import build

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


@torch.no_grad()
def main() -> None:
    rows = []
    for threads, width in itertools.product((1, torch.get_num_threads()), (16, 64)):
        torch.set_num_threads(threads)
        network = build("resnet18", 10, 3, width=width).eval()
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
                "width": width,
                "channels": len(neurons),
                "seconds_svd": median(slow),
                "seconds_batched": median(fast),
                "ratio": ratio,
                "largest_difference": error,
            }
        )
        print(json.dumps(rows[-1]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"rounds": ROUNDS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
