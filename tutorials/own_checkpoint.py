"""Repair your own checkpoint: a module of your own, a file of weights, a few clean images.

    python tutorials/own_checkpoint.py    # under half a minute

In place of a download, the first half makes what somebody might hand you: a digits classifier that calls every image with
a bright corner a seven. At the command line the second half is

    backdoor-gym repair classifier.pt --module tutorials.own_checkpoint:Classifier --clean FOLDER --mean 0.3 --std 0.4
"""

from itertools import pairwise

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backdoor_gym import InfectedModel, repair
from backdoor_gym.networks.preprocessing import Normalise

#: What the network was trained behind: from images in [0, 1], as this package holds them, to what the network takes.
normalise = Normalise(mean=[0.3], std=[0.4])


class Classifier(nn.Module):
    """Any module that torch.fx can trace will do. This one takes images that were normalised before."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for inputs, outputs in pairwise([1, 32, 32, 64, 64]):
            self.features.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()])
        self.classify = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        return self.classify(self.features(images).mean((2, 3)))


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
            nn.functional.cross_entropy(network(normalise(images[batch])), labels[batch]).backward()
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

    # weights_only=True, as a pickle from a stranger could run anything. What torch refuses so, or finds wrapped in other
    # things, load_infected(FILE, module=Classifier, clean=...) reads without running anything in it.
    network = Classifier()
    network.load_state_dict(torch.load("classifier.pt", weights_only=True))

    # Network and clean images (or a Dataset, a folder, an .npz) are all that a repair sees; what else is known is for figures.
    known = {"test": (images[test], labels[test]), "trigger": trigger, "target": 7}
    infected = InfectedModel.from_module(network, (images[clean], labels[clean]), **known, preprocess=normalise)
    result = repair(infected, accuracy_budget=0.03)  # ONP, which learned on other networks
    print(f"backdoor: {result.verdict:.2f} likely, and calls label {result.suspected_target}")
    for when, figures in (("before", result.before), ("after", result.after)):
        print(f"{when:<7} ACC {figures.acc:.3f}   ASR {figures.asr:.3f}   RA {figures.ra:.3f}")
    print(f"pruned {len(result.pruned)} of {len(result.neurons)} neurons: {', '.join(result.pruned[:5])}, ...")

    # result.module is a Classifier with zeros in its weights, result.network the same behind the normalisation.
    save_file(result.module.state_dict(), "repaired.safetensors")
    network.load_state_dict(load_file("repaired.safetensors"))


if __name__ == "__main__":
    main()
