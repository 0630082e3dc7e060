"""All signs of a backdoor that weights and clean images give, and how sure they make.

There are two kinds of evidence: what the BN means of training have over the clean images (``bn_evidence.py``), and how little of
an image must change to give a label (``label_inversion.py``). The first is missing without batch normalisation and where
the statistics were computed anew or folded; the second is weak where the trigger is spread over the image.

Either kind is enough, so the probability is that of a noisy or: 1 - (1 - that by the masks) * (1 - that by the BN statistics),
each a logistic function of its sign. Both were fitted together on ``world-train`` and ``digits-val``, half of which is clean.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..metrics import accuracy, predict_logits
from ..neurons.layers import Neurons
from .bn_evidence import BNEvidence, find_bn_evidence
from .label_inversion import LEAST_LABELS, LabelEvidence, compare_labels, invert_label
from .trigger_inversion import InvertedTrigger

#: Share of networks that have a backdoor, before anything is known of one. In the fit it is one half.
PRIOR = 0.2
#: Probability from which a network is repaired: of 39 clean networks that were left out of the fit in turn, one lies above.
VERDICT_THRESHOLD = 0.5
#: Clean images that evidence needs. In the fit no defender has fewer than 50.
LEAST_IMAGES = 40
#: Said of a network without any kind of evidence.
SILENT = (
    "nothing tells whether it has a backdoor: there is no batch normalisation and clean images are of fewer than "
    f"{LEAST_LABELS} labels; or it does not know the clean images; or there are fewer than {LEAST_IMAGES} of them"
)
#: Log odds of either kind of evidence alone: without any sign, and by sign.
MASK_ODDS, MASK_WEIGHT = -2.1, 5.9
BN_ODDS, BN_WEIGHT = -3.9, 7.5


@dataclass(frozen=True)
class Evidence:
    """What speaks for a backdoor in one network.

    Attributes:
        bn: what the BN statistics say; None without batch normalisation.
        label: what the label alone says; None where the clean images are of one class.
        inverted: triggers of the target; None where none can be sought.
        tells: whether there are enough clean images, and the network knows them: one that guesses has short ways to its labels,
            too.
    """

    bn: BNEvidence | None
    label: LabelEvidence | None
    inverted: InvertedTrigger | None = None
    tells: bool = True

    @property
    def signs(self) -> Mapping[str, float]:
        """The figures that the probability is computed from; that of a kind that is missing is not there.

        ``mask`` is log2 of the second smallest mask over the smallest one, ``bn`` the evidence of the BN statistics.
        """
        signs: dict[str, float] = {}
        if not self.tells:
            return signs
        if self.label is not None:
            signs["mask"] = math.log2(self.label.lead)
        if self.bn is not None:
            signs["bn"] = self.bn.evidence
        return signs

    @property
    def probability(self) -> float:
        """That the network has a backdoor; ``PRIOR`` where nothing can tell."""
        signs, neither = self.signs, 1.0
        if "mask" in signs:
            neither *= _without(MASK_ODDS + MASK_WEIGHT * signs["mask"])
        if "bn" in signs:
            neither *= _without(BN_ODDS + BN_WEIGHT * signs["bn"])
        infected, clean = PRIOR * (1 - neither), (1 - PRIOR) * neither
        return infected / (infected + clean) if signs else PRIOR

    @property
    def target(self) -> int | None:
        """The label that the clearer kind of evidence names."""
        label, bn = self.label, self.bn
        if label is None:
            return None if bn is None else bn.suspected.target
        return bn.suspected.target if bn is not None and bn.evidence > 1 - label.ratio else label.target


def _without(log_odds: float) -> float:
    """Probability that there is no backdoor."""
    return 1 / (1 + math.exp(log_odds))


def _knows(neurons: Neurons, images: Tensor, labels: Tensor) -> bool:
    """Whether the network gets twice as many images right as the commonest label alone would, or half of the others."""
    chance = labels.bincount().max().item() / len(labels)
    logits = predict_logits(neurons.graph, images)
    return accuracy(logits, labels.cpu()) >= min(2 * chance, (1 + chance) / 2)


def find_evidence(neurons: Neurons, images: Tensor, labels: Tensor) -> Evidence:
    """The evidence of a network.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    bn, label = find_bn_evidence(neurons, images, labels), compare_labels(neurons, images, labels)
    evidence = Evidence(bn, label, None, len(images) >= LEAST_IMAGES and _knows(neurons, images, labels))
    if evidence.target is None or bool((labels == evidence.target).all()):
        return evidence
    # What changes any network's answer is no trigger, and to prune for it costs accuracy: only kinds that tell are asked.
    explained = bn.inverted if bn is not None and bn.suspected.target == evidence.target else None
    if explained is not None and not (label is not None and label.points_to(evidence.target)):
        return replace(evidence, inverted=explained)
    seen = images if bn is None else bn.images  # as the other kind saw them
    masks, _ = invert_label(neurons, seen, labels, evidence.target)
    return replace(evidence, inverted=masks if explained is None else explained.with_others(masks))
