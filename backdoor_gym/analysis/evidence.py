"""All signs of a backdoor that weights and clean images give, and how sure they make.

Two kinds of evidence agree where training left statistics: what the BN means have over the clean images (``bn_evidence.py``),
and how little of an image must change to give a label (``label_inversion.py``). The first is missing without batch
normalisation and where the statistics were computed anew or folded; the second is weak where the trigger is spread over the
image. Where the first is beyond doubt (``SURE``) the second, which is dearer, is not sought.

The probability is that of a logistic regression on the signs. It was fitted on ``world-train``, as half of which is clean.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..neurons.layers import Neurons
from .bn_evidence import BNEvidence, find_bn_evidence
from .label_inversion import LabelEvidence, invert_by_label
from .trigger_inversion import InvertedTrigger

#: Evidence in the BN statistics from which no other is sought.
SURE = 0.9
#: Probability where it is: of networks of ``world-train`` with so much, the share that is infected.
PROBABILITY_IF_SURE = 0.98
#: Probability from which a network is repaired.
VERDICT_THRESHOLD = 0.5
#: Log odds by sign, and without any.
WEIGHTS = {"mask": 2.0, "gap": 2.0, "bn": 3.0, "agreement": 1.0}
INTERCEPT = -4.0


@dataclass(frozen=True)
class Evidence:
    """What speaks for a backdoor in one network.

    Attributes:
        bn: what the BN statistics say; None without batch normalisation.
        label: what the label alone says; None where it was not sought, or the clean images are of one class.
    """

    bn: BNEvidence | None
    label: LabelEvidence | None

    @property
    def signs(self) -> Mapping[str, float]:
        """The figures that the probability is computed from.

        ``mask`` is log2 of the median mask over the smallest one, ``gap`` log2 of the second smallest over it, ``bn`` the
        evidence of the BN statistics, and ``agreement`` 1 where both kinds name the same label; 0 where one is missing.
        """
        label, bn = self.label, 0.0 if self.bn is None else self.bn.evidence
        if label is None:
            return {"mask": 0.0, "gap": 0.0, "bn": bn, "agreement": 0.0}
        agree = self.bn is not None and self.bn.suspected.target == label.target
        return {
            "mask": -math.log2(label.ratio),
            "gap": math.log2(label.second / label.ratio),
            "bn": bn,
            "agreement": float(agree),
        }

    @property
    def probability(self) -> float:
        """That the network has a backdoor."""
        if self.is_sure:
            return PROBABILITY_IF_SURE
        if self.label is None and self.bn is None:
            return 0.0
        odds = INTERCEPT + sum(WEIGHTS[name] * value for name, value in self.signs.items())
        return 1 / (1 + math.exp(-odds))

    @property
    def is_sure(self) -> bool:
        """Whether the BN statistics alone are beyond doubt."""
        return self.bn is not None and self.bn.evidence >= SURE

    @property
    def inverted(self) -> InvertedTrigger | None:
        """The trigger of the evidence that says more; None where none could be sought."""
        if self.label is None or self.is_sure:
            return None if self.bn is None else self.bn.inverted
        return self.label.inverted

    @property
    def target(self) -> int | None:
        """The label that it gives."""
        if self.inverted is not None:
            return self.inverted.target
        return None if self.bn is None else self.bn.suspected.target


def find_evidence(neurons: Neurons, images: Tensor, labels: Tensor) -> Evidence:
    """The evidence of a network.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    bn = find_bn_evidence(neurons, images, labels)
    if bn is not None and bn.evidence >= SURE:
        return Evidence(bn, None)
    return Evidence(bn, invert_by_label(neurons, images, labels))
