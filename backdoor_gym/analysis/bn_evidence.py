"""What the BN statistics say of a backdoor, read with the clean images as training had them.

A trigger is what the running statistics have over the clean images (``suspected_target.py``, ``trigger_inversion.py``), and
whatever else a defender's images have over those of training hides it: the search then finds what undoes that instead. So
small corrections of the images are tried: another brightness, and black where they are nearly black, which compression
leaves of black ground. The one that brings the early half of the network nearest to its running means is taken, and where
it explains most of the gap the trigger is sought a second time, in corrected images. But a trigger that adds light moves the
early means just so, and such a correction explains it away. Which reading is right is told by what neither was asked for:
that of more evidence is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.training import augment
from ..neurons.layers import Neurons
from .batch_norms import NormReader, class_weights, early_half, normalised_layers, running_statistics
from .suspected_target import AUGMENTED, SuspectedTarget, suspect_target
from .trigger_inversion import InvertedTrigger, invert_trigger

#: Steps in which a correction is looked for, and how many.
STEPS = {"brighter": 0.015, "darker": 0.015, "black": 0.035}
MOST_STEPS = 4
#: Share of the squared gap of the early means that may be left if the images are to be corrected.
EXPLAINED = 0.5
#: Of the clean images, as many as a correction is looked for with.
IMAGES = 100


@dataclass(frozen=True)
class Correction:
    """A small change of all images.

    Attributes:
        kind: "none", "brighter", "darker", or "black" (what is below the level becomes 0).
        level: how much, in units of the images.
    """

    kind: str = "none"
    level: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """The images, float32 (n, C, H, W) in [0, 1], after it."""
        if self.kind == "black":
            return images.where(images >= self.level, 0.0)
        if self.kind == "none":
            return images
        return (images + (self.level if self.kind == "brighter" else -self.level)).clamp(0, 1)


@dataclass(frozen=True)
class BNEvidence:
    """What the running statistics say of a backdoor.

    Attributes:
        correction: of the clean images.
        images: the clean images after it, float32 (n, C, H, W) in [0, 1].
        suspected: the target and the means of triggered images.
        inverted: the trigger, None where none could be sought.
    """

    correction: Correction
    images: Tensor
    suspected: SuspectedTarget
    inverted: InvertedTrigger | None

    @property
    def evidence(self) -> float:
        """Of the inverted trigger, 0 where there is none."""
        return 0.0 if self.inverted is None else self.inverted.evidence


def find_bn_evidence(neurons: Neurons, images: Tensor, labels: Tensor) -> BNEvidence | None:
    """The evidence with the correction that leaves more of it, or None where there is no batch normalisation that could tell.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    if not normalised_layers(neurons):
        return None
    candidates = [_evidence_under(neurons, images, labels, Correction())]
    correction = find_correction(neurons, images, labels)
    if correction.kind != "none":
        candidates.append(_evidence_under(neurons, images, labels, correction))
    return max(candidates, key=lambda candidate: candidate.evidence)


def _evidence_under(neurons: Neurons, images: Tensor, labels: Tensor, correction: Correction) -> BNEvidence:
    corrected = correction(images)
    suspected = suspect_target(neurons, corrected, labels)
    assert suspected is not None  # the network is normalised
    return BNEvidence(correction, corrected, suspected, invert_trigger(neurons, corrected, labels, suspected))


@torch.no_grad()
def find_correction(neurons: Neurons, images: Tensor, labels: Tensor) -> Correction:
    """What leaves the least of the early layers' gap; none where that is not less than ``EXPLAINED`` of it.

    Args:
        neurons: of a network with batch normalisation.
        images: clean images, float32 (n, C, H, W) in [0, 1]; the first ``IMAGES`` are used.
        labels: int64 (n,).
    """
    device = next(neurons.graph.parameters()).device
    images, labels = images[:IMAGES].to(device, memory_format=torch.channels_last), labels[:IMAGES].to(device)
    weights, norms = class_weights(labels), normalised_layers(neurons)
    running, deviations = running_statistics(neurons.graph, norms)
    early = early_half(norms)

    def gap(correction: Correction, cropped: bool) -> float:
        seen = correction(images)
        if cropped:
            seen = augment(seen, torch.Generator().manual_seed(0))
        reader = NormReader(neurons, weights).run_on(seen)
        off = [(running[name] - reader.mean(name, weights)) / deviations[name] for name in early]
        return sum(gaps.square().mean().item() for gaps in off)

    plain, augmented = (gap(Correction(), cropped) for cropped in (False, True))
    may_be_cropped = augmented < AUGMENTED * plain
    best, least = Correction(), EXPLAINED * (augmented if may_be_cropped else plain)
    for cropped, as_it_is in ((False, plain), (True, augmented))[: 1 + may_be_cropped]:
        for kind, step in STEPS.items():
            before = as_it_is
            for steps in range(1, MOST_STEPS + 1):
                correction = Correction(kind, steps * step)
                left = gap(correction, cropped)
                if left >= before:
                    break
                before = left
                if left < least:
                    best, least = correction, left
    return best
