"""What the BN statistics say of a backdoor, read with the clean images at the brightness that training had.

A trigger is what the running statistics have over the clean images (``suspected_target.py``, ``trigger_inversion.py``), and a
defender's images that are brighter than those of training hide it: the search then finds what undoes the brightness. So
the brightness that brings the early half of the network nearest to its running means is looked for, and where it
explains most of the gap the trigger is sought a second time, on images moved there. But a trigger that adds light moves
the early means just so, and such a move explains it away. Which reading is right is told by what neither was asked for:
that of more evidence is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pruning.neurons import Neurons
from ..zoo.training import augment
from .batch_norms import NormReader, class_weights, early_half, normalised_layers, running_statistics
from .suspected_target import AUGMENTED, SuspectedTarget, suspect_target
from .trigger_inversion import InvertedTrigger, invert_trigger

#: Brightness is looked for in steps of this, to both sides, as far as this many.
STEP, MOST_STEPS = 0.015, 4
#: Share of the squared gap of the early means that may be left if the images are to have another brightness.
MOVED = 0.5
#: Of the clean images, as many as the brightness is looked for with.
IMAGES = 100


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        brightness: what was added to the clean images, 0 where nothing was.
        images: the clean images after it, float32 (n, C, H, W) in [0, 1].
        suspected: the target and the means of triggered images.
        inverted: the trigger, None where none could be sought.
    """

    brightness: float
    images: Tensor
    suspected: SuspectedTarget
    inverted: InvertedTrigger | None

    @property
    def evidence(self) -> float:
        """Of the inverted trigger, 0 where there is none."""
        return 0.0 if self.inverted is None else self.inverted.evidence


def read_statistics(neurons: Neurons, images: Tensor, labels: Tensor) -> Reading | None:
    """The reading of more evidence, or None where there is no batch normalisation that could tell.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    if not normalised_layers(neurons):
        return None
    readings = [_read(neurons, images, labels, 0.0)]
    brightness = brightness_of_training(neurons, images, labels)
    if brightness:
        readings.append(_read(neurons, images, labels, brightness))
    return max(readings, key=lambda reading: reading.evidence)


def _read(neurons: Neurons, images: Tensor, labels: Tensor, brightness: float) -> Reading:
    moved = (images + brightness).clamp(0, 1) if brightness else images
    suspected = suspect_target(neurons, moved, labels)
    assert suspected is not None  # the network is normalised
    return Reading(brightness, moved, suspected, invert_trigger(neurons, moved, labels, suspected))


@torch.no_grad()
def brightness_of_training(neurons: Neurons, images: Tensor, labels: Tensor) -> float:
    """What added to the images leaves less than ``MOVED`` of the early layers' gap, 0 where nothing does.

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

    def gap(brightness: float, cropped: bool) -> float:
        seen = (images + brightness).clamp(0, 1)
        if cropped:
            seen = augment(seen, torch.Generator().manual_seed(0))
        reader = NormReader(neurons, weights).run_on(seen)
        off = [(running[name] - reader.mean(name, weights)) / deviations[name] for name in early]
        return sum(one.square().mean().item() for one in off)

    plain, augmented = gap(0.0, cropped=False), gap(0.0, cropped=True)
    may_be_cropped = augmented < AUGMENTED * plain
    found, least = 0.0, MOVED * (augmented if may_be_cropped else plain)
    for cropped, as_it_is in ((False, plain), (True, augmented))[: 1 + may_be_cropped]:
        for step in (STEP, -STEP):
            before = as_it_is
            for steps in range(1, MOST_STEPS + 1):
                left = gap(steps * step, cropped)
                if left >= before:
                    break
                before = left
                if left < least:
                    found, least = steps * step, left
    return found
