"""Trigger inversion by the label alone, for networks without batch normalisation.

Without running statistics nothing is left of training but what the network answers. So a small addition to the image is
sought for each label in turn, with which clean images of all others get it (Neural Cleanse, Wang et al., IEEE S&P 2019),
by the least cross-entropy plus ``PRICE`` times the mean absolute change of a pixel: the attacker's label is the one that is
had at the least cost, since training has made a short way to it. Every network has such additions for every label, though;
how far the label stands out is all that speaks for a backdoor, and ``evidence`` is that: the gap between the least cost and
the second, over the median cost of the labels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..neurons.layers import Neurons
from .trigger_families import Addition
from .trigger_inversion import IMAGES, InvertedTrigger, TriggerSearch

#: Cost of a mean absolute change of 1 in units of cross-entropy.
PRICE = 30.0
#: Steps for each label; and those after which of many labels the cheapest are gone on with, and how many these are.
STEPS, FIRST_STEPS, MOST_LABELS = 30, 8, 20


class _Search(TriggerSearch):
    """The search for the addition of one label, and what the addition costs."""

    def __init__(self, images: Tensor, label: int) -> None:
        super().__init__(Addition(images))
        self.label, self.cost = label, math.inf

    def go_on(self, neurons: Neurons, foreign: Tensor, steps: int) -> None:
        """Go on for so many steps, and take the cost over all images of other labels."""

        def loss(triggered: Tensor) -> Tensor:
            targets = torch.full((len(triggered),), self.label, device=triggered.device)
            logits = neurons.graph(triggered.contiguous(memory_format=torch.channels_last))
            return F.cross_entropy(logits, targets) + PRICE * self.trigger.price()

        self.go(steps, foreign, loss)
        with torch.no_grad():
            self.cost = loss(self.trigger(foreign)).item()


def invert_by_label(neurons: Neurons, images: Tensor, labels: Tensor, num_classes: int) -> InvertedTrigger | None:
    """The addition of the label that is had at the least cost; None where all images are of one label.

    Of the result, ``error`` is log10 of that cost over the median one.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1]; the first ``IMAGES`` are used.
        labels: int64 (n,).
        num_classes: number of logits.
    """
    device = next(neurons.graph.parameters()).device
    images = images[:IMAGES].to(device, memory_format=torch.channels_last)
    labels = labels[:IMAGES].to(device)
    searches = [_Search(images, label) for label in range(num_classes) if (labels != label).any()]
    if len(searches) < 2 or len(labels.unique()) < 2:
        return None
    done = 0
    if len(searches) > MOST_LABELS:
        for search in searches:
            search.go_on(neurons, images[labels != search.label], FIRST_STEPS)
        searches = sorted(searches, key=lambda search: search.cost)[:MOST_LABELS]
        done = FIRST_STEPS
    for search in searches:
        search.go_on(neurons, images[labels != search.label], STEPS - done)
    best, second, *_ = sorted(searches, key=lambda search: search.cost)
    median = float(torch.tensor([search.cost for search in searches]).median())
    foreign = images[labels != best.label]
    with torch.no_grad():
        triggered = best.trigger(foreign).contiguous(memory_format=torch.channels_last)
    return InvertedTrigger(
        best.label,
        (best.trigger.name,),
        foreign,
        triggered,
        size=(triggered - foreign).abs().mean().item(),
        error=math.log10(max(best.cost, 1e-12) / max(median, 1e-12)),
        evidence=(second.cost - best.cost) / max(median, 1e-12),
    )
