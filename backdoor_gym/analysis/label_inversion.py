"""Trigger inversion by the label alone, for every network.

For each label a mask and a pattern are sought with which the clean images of all other labels get it (Neural Cleanse, Wang et
al., IEEE S&P 2019, section IV): images * (1 - mask) + pattern * mask, by the least cross-entropy plus a weight times the
size of the mask. The weight of each label grows while ``SUCCESS`` of its images get the label and falls while they do
not, so that all masks end where they just do it. Training on triggered images made a short way to the attacker's label:
its mask is far smaller than those of the others. Every network has some mask for every label; ``ratio``, the smallest
over the median, is what speaks for a backdoor.

All labels are sought at once, in one batch. Of many labels those are sought that images get most under one perturbation
that shall only change their own label, and a few others as the measure. Labels that no clean image has are left out: what
the defender has no images of cannot be told from what is missing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..metrics import danger, require_finite
from ..neurons.layers import Neurons
from .trigger_inversion import IMAGES, InvertedTrigger

#: Images of each label in one step of the search, steps, and step size of Adam in units of the logits of mask and pattern.
BATCH, STEPS, RATE = 16, 40, 0.5
#: Logit of the mask at the beginning.
BEGIN = -2.0
#: Weight of a mask that covers the whole image at the beginning, its bounds, and how it changes in a step.
WEIGHT, LEAST_WEIGHT, MOST_WEIGHT, GROWTH = 20.0, 0.1, 1000.0, 1.3
#: Share of the images that a mask shall give its label.
SUCCESS = 0.9
#: Last steps over which sizes and successes are a mean, and least success that a size is divided by.
LAST, LEAST_SUCCESS = 8, 0.2
#: Labels that are sought of many, and how many of these are the measure.
MOST_LABELS, MEASURE = 12, 6
#: Steps of the perturbation that chooses them.
SCREEN_STEPS = 10


@dataclass(frozen=True)
class LabelEvidence:
    """How little of an image must change to give each label.

    Attributes:
        labels: those that were sought, int64 (k,).
        sizes: of their masks, a share of the image, over their success, float32 (k,).
        ratio: the smallest size over the median.
        second: the second smallest size over the median.
        success: share of the images of other labels that the smallest mask gives its label.
        inverted: the trigger of the smallest mask.
    """

    labels: Tensor
    sizes: Tensor
    ratio: float
    second: float
    success: float
    inverted: InvertedTrigger

    @property
    def target(self) -> int:
        """The label of the smallest mask."""
        return self.inverted.target
