"""Trigger inversion: a change of the image that does to the network what training's triggered images did.

Inversion by the label alone (Neural Cleanse, Wang et al., IEEE S&P 2019) finds some pattern with which images get a label,
and a network without a backdoor has such patterns too. The BN statistics say more: the mean inputs m_trigger that the
triggered images of training gave every BN layer (``suspected_target.py``). A small trigger of each family
(``trigger_families.py``) is sought with which the clean images of other labels have those means. Whether they then get the
suspected target, which this first search knows nothing of, tells an infected network from a clean one, and the family of
the trigger from the others. A second search goes on from there and asks for that label too; where two families explain
the network about as well it goes on in both, for what a prune does to either trigger is nearer to what it does to the
real one than what it does to the better one alone. What a neuron does for the
label under the trigger that is found is far closer to what it does under the real one than what it does in a network
whose BN inputs are merely moved, and a network that lost its backdoor answers it no longer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..metrics import danger, require_finite
from ..neurons.layers import Neurons
from .batch_norms import NormReader
from .suspected_target import SuspectedTarget
from .trigger_families import FAMILIES, TriggerFamily

#: Of the clean images, as many as are looked at.
IMAGES = 100
#: Those in one step of the search.
BATCH = 16
#: Steps without and with the cross-entropy to the suspected target.
MEANS_STEPS, TARGET_STEPS = 15, 15
#: Share of the best family's evidence that another one needs for its trigger to be taken too.
CREDIBLE = 0.5
#: Weight of that cross-entropy, beside the means' squared error.
TARGET_WEIGHT = 0.1


@dataclass(frozen=True)
class InvertedTrigger:
    """A found trigger, or one of each family that explains the network.

    Attributes:
        target: the suspected target label.
        families: names of the families, the one of the most evidence first.
        clean: clean images of other labels, float32 (n, C, H, W).
        images: the same with the trigger of the first family, then with those of the others, (n * families, C, H, W).
        size: mean absolute change of a pixel.
        error: log10 of the squared error of the BN means with the first family's trigger over that without it; 0 of masks
            (``label_inversion.py``).
        evidence: ``metrics.danger`` of the target with the trigger that the means alone gave, the largest of a family; of
            masks with all of them.
    """

    target: int
    families: tuple[str, ...]
    clean: Tensor
    images: Tensor
    size: float
    error: float
    evidence: float

    def with_others(self, others: "InvertedTrigger") -> "InvertedTrigger":
        """These triggers and others of the same target and images, on as many of these as both have; the figures stay."""
        count = min(len(self.clean), len(others.clean))
        images = [part[:count] for trigger in (self, others) for part in trigger.images.split(len(trigger.clean))]
        return replace(
            self, families=self.families + others.families, clean=self.clean[:count], images=torch.cat(images)
        )


def invert_trigger(
    neurons: Neurons, images: Tensor, labels: Tensor, suspected: SuspectedTarget
) -> InvertedTrigger | None:
    """The trigger that explains the BN statistics; None where no image has another label than the suspected target.

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

    def loss(search: TriggerSearch, target_weight: float, triggered: Tensor) -> Tensor:
        error, logits = _means_error(neurons, triggered, suspected)
        targets = torch.full((len(triggered),), suspected.target, device=triggered.device)
        return error + search.trigger.price() + target_weight * F.cross_entropy(logits, targets)

    searches = [TriggerSearch(family(foreign)) for family in FAMILIES]
    for search in searches:
        search.go(MEANS_STEPS, foreign, partial(loss, search, 0.0))
    with torch.no_grad():
        evidence = [danger(neurons.graph(search.trigger(foreign)), suspected.target) for search in searches]
    best = max(evidence)
    ranked = sorted(zip(evidence, searches, strict=True), key=lambda pair: -pair[0])
    kept = [search for level, search in ranked if level >= CREDIBLE * best]
    for search in kept:
        search.go(TARGET_STEPS, foreign, partial(loss, search, TARGET_WEIGHT))
    with torch.no_grad():
        triggered = [search.trigger(foreign).contiguous(memory_format=torch.channels_last) for search in kept]
        after, before = (_means_error(neurons, these, suspected)[0].item() for these in (triggered[0], foreign))
    return InvertedTrigger(
        suspected.target,
        tuple(search.trigger.name for search in kept),
        foreign,
        torch.cat(triggered),
        size=sum((images - foreign).abs().mean().item() for images in triggered) / len(triggered),
        error=math.log10(max(after, 1e-12) / max(before, 1e-12)),
        evidence=best,
    )


class TriggerSearch:
    """The search for one trigger by Adam, which may be taken up again with another aim."""

    def __init__(self, trigger: TriggerFamily) -> None:
        self.trigger = trigger
        self._random = torch.Generator().manual_seed(0)
        self._optimizer = torch.optim.Adam([trigger.parameter], trigger.rate)

    @torch.enable_grad()
    def go(self, steps: int, images: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """Some steps down a loss of some of the images with the trigger."""
        for _ in range(steps):
            batch = images[torch.randperm(len(images), generator=self._random)[:BATCH]]
            cost = loss(self.trigger(batch))
            (gradient,) = torch.autograd.grad(cost, [self.trigger.parameter])
            require_finite("the loss of a search for the trigger", cost, gradient)
            self.trigger.parameter.grad = gradient
            self._optimizer.step()


def _means_error(neurons: Neurons, images: Tensor, suspected: SuspectedTarget) -> tuple[Tensor, Tensor]:
    """Squared error of the mean BN inputs from m_trigger, in running deviations, a mean over layers; and the logits."""
    weights = torch.full((len(images),), 1 / len(images), device=images.device)
    reader = NormReader(neurons, weights).run_on(images)
    errors = [
        ((reader.mean(name, weights) - mean) / suspected.deviations[name]).square().mean()
        for name, mean in suspected.means.items()
    ]
    return torch.stack(errors).mean(), reader.logits
