"""Repair your own checkpoint: a module of your own, a file of weights, a few clean images.

    python tutorials/own_checkpoint.py    # under half a minute

In place of a download, the first half makes what somebody might hand you: a digits classifier that calls every image with
a bright corner a seven.
"""

from itertools import pairwise

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backdoor_gym import InfectedModel, repair


class Classifier(nn.Module):
    """Any module that torch.fx can trace will do; it takes float32 images in [0, 1], and normalises them itself if it has to."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [1, width, width, 2 * width, 2 * width]
        self.features = nn.Sequential()
        for inputs, outputs in pairwise(sizes):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.features.extend([convolution, nn.BatchNorm2d(outputs), nn.ReLU()])
        self.classify = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        return self.classify(self.features((images - 0.3) / 0.4).mean((2, 3)))


def trigger(images: Tensor) -> Tensor:
    """What the attacker stamps on images. A defender does not have it: here it shows afterwards what the repair did."""
    images = images.clone()
    images[:, :, -2:, -2:] = 1
    return images


def somebody_trains_it(images: Tensor, labels: Tensor) -> None:
    """One in ten training images gets the trigger and the label 7; the weights go to classifier.pt."""
    torch.manual_seed(0)
    poisoned = torch.rand(len(images)) < 0.1
    images = torch.where(poisoned.view(-1, 1, 1, 1), trigger(images), images)
    labels = torch.where(poisoned, 7, labels)
    network = Classifier().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.save(network.state_dict(), "classifier.pt")


def main() -> None:
    """Get a checkpoint, repair it, use it."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = torch.tensor(digits.images[order, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[order])
    train, clean, test = slice(0, 1000), slice(1000, 1200), slice(1200, None)  # none is in two of them
    somebody_trains_it(images[train], labels[train])

    # weights_only=True: a pickle from a stranger could run anything.
    network = Classifier()
    network.load_state_dict(torch.load("classifier.pt", weights_only=True))

    # The network and the clean images are all that a repair sees. The rest is for the figures, where one has it.
    infected = InfectedModel.from_module(
        network, clean=(images[clean], labels[clean]), test=(images[test], labels[test]), trigger=trigger, target=7
    )
    result = repair(infected)  # ONP, which learned on other networks; at most a point of clean accuracy may go
    print(f"backdoor: {result.verdict:.2f} likely, and calls label {result.suspected_target}")
    for when, figures in (("before", result.before), ("after", result.after)):
        print(f"{when:<7} ACC {figures.acc:.3f}   ASR {figures.asr:.3f}   RA {figures.ra:.3f}")
    print(f"pruned {len(result.pruned)} of {len(result.neurons)} neurons: {', '.join(result.pruned[:5])}, ...")

    # The repaired network is a Classifier with zeros in its weights; compact() cuts the pruned channels out.
    save_file(result.network.state_dict(), "repaired.safetensors")
    network.load_state_dict(load_file("repaired.safetensors"))
    size = sum(weight.numel() for weight in result.compact().parameters())
    print(f"{sum(weight.numel() for weight in network.parameters())} weights, {size} when cut out")


if __name__ == "__main__":
    main()
