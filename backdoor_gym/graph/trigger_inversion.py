"""Trigger inversion: a pattern on the image that does to the network what training's triggered images did.

Inversion by the label alone (Neural Cleanse, Wang et al., IEEE S&P 2019) finds some pattern with which images get a label,
and a network without a backdoor has such patterns too. The BN statistics say more: the mean inputs m_trigger that the
triggered images of training gave every BN layer (``suspected_target.py``). One small pattern, added to every image, is
sought with which the clean images of other labels have those means. Whether they then get the suspected target, which
this first search knows nothing of, tells an infected network from a clean one. A second, short search goes on from there
and asks for that label too. What a neuron does for the label under the pattern is far closer to what it does under the
real trigger than what it does in a network whose BN inputs are merely moved, and a network that lost its backdoor
answers the pattern no longer.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..metrics import danger
from ..pruning.neurons import Neurons
from .batch_norms import NormReader
from .suspected_target import SuspectedTarget

#: Of the clean images, as many as are looked at.
IMAGES = 100
#: Those in one step of the search.
BATCH = 32
#: Steps without and with the cross-entropy to the suspected target.
MEANS_STEPS, TARGET_STEPS = 20, 25
LEARNING_RATE = 0.1
#: Weights of that cross-entropy and of the mean absolute pattern, beside the means' squared error.
TARGET_WEIGHT, SIZE_WEIGHT = 0.1, 1.0


@dataclass(frozen=True)
class InvertedTrigger:
    """A found trigger.

    Attributes:
        target: the suspected target label.
        pattern: what is added to an image before it is cut to [0, 1], float32 (1, C, H, W).
        clean: clean images of other labels, float32 (n, C, H, W).
        images: the same with the pattern.
        size: mean absolute value of the pattern.
        error: log10 of the squared error of the BN means with the pattern over that without it.
        evidence: ``metrics.danger`` of the target with the pattern that the means alone gave.
    """

    target: int
    pattern: Tensor
    clean: Tensor
    images: Tensor
    size: float
    error: float
    evidence: float


def invert_trigger(
    neurons: Neurons, images: Tensor, labels: Tensor, suspected: SuspectedTarget
) -> InvertedTrigger | None:
    """The pattern that explains the BN statistics; None where no image has another label than the suspected target.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1]; those of other labels among the first
            ``IMAGES`` are used.
        labels: int64 (n,).
        suspected: the target and the means to be explained.
    """
    device = next(neurons.graph.parameters()).device
    foreign = images[:IMAGES][labels[:IMAGES] != suspected.target].to(device, memory_format=torch.channels_last)
    if not len(foreign):
        return None
    random = torch.Generator().manual_seed(0)
    pattern = torch.zeros_like(foreign[:1], requires_grad=True)
    optimizer = torch.optim.Adam([pattern], LEARNING_RATE)
    evidence = 0.0
    for step in range(MEANS_STEPS + TARGET_STEPS):
        if step == MEANS_STEPS:
            evidence = _danger(neurons, foreign + pattern, suspected.target)
        some = foreign[torch.randperm(len(foreign), generator=random)[:BATCH]]
        error, logits = _means_error(neurons, (some + pattern).clamp(0, 1), suspected)
        loss = error + SIZE_WEIGHT * pattern.abs().mean()
        if step >= MEANS_STEPS:
            wanted = torch.full((len(some),), suspected.target, device=some.device)
            loss = loss + TARGET_WEIGHT * F.cross_entropy(logits, wanted)
        (pattern.grad,) = torch.autograd.grad(loss, [pattern])
        optimizer.step()
    pattern = pattern.detach()
    images = (foreign + pattern).clamp(0, 1)
    with torch.no_grad():
        after, before = (_means_error(neurons, these, suspected)[0].item() for these in (images, foreign))
    error_ratio = math.log10(max(after, 1e-12) / max(before, 1e-12))
    return InvertedTrigger(
        suspected.target, pattern, foreign, images, pattern.abs().mean().item(), error_ratio, evidence
    )


def _means_error(neurons: Neurons, images: Tensor, suspected: SuspectedTarget) -> tuple[Tensor, Tensor]:
    """Squared error of the mean BN inputs from m_trigger, in running deviations, a mean over layers; and the logits."""
    weights = torch.full((len(images),), 1 / len(images), device=images.device)
    reader = NormReader(neurons, weights).run_on(images)
    errors = [
        ((reader.mean(name, weights) - wanted) / suspected.deviations[name]).square().mean()
        for name, wanted in suspected.means.items()
    ]
    return torch.stack(errors).mean(), reader.logits


@torch.no_grad()
def _danger(neurons: Neurons, images: Tensor, target: int) -> float:
    return danger(neurons.graph(images.clamp(0, 1)), target)
