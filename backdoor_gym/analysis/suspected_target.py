"""What training left of a backdoor in the BN statistics: the attacker's label, and what the trigger does inside.

The running means of a poisoned training average over a share p of triggered images: m = (1 - p) * m_clean + p * m_trigger
in every channel. The defender's clean images give m_clean, so m_trigger = m_clean + (m - m_clean) / p. A network whose
BN inputs are moved there, layer after layer, answers clean images much like triggered ones: the suspected target is the
label they then get. p is not known; ``POISON_RATE`` stands for it, and what follows does not hang on its exact value.

Two things other than a trigger move means too. Classes that are rarer among the defender's images than in training:
every class weighs the same in m_clean, as if training had been balanced. And images that differ from those of training
throughout, by compression say. So the target is read twice, as that whose mean probability rises most: from the network
moved as above, and from one whose early BN layers are moved by m - m_clean alone, as such a difference would move them,
while only what the late half then still lacks is divided by p. The reading in which one label stands out most is taken:
the first sees faint triggers that the second takes for such a difference, the second holds where there is one.

A class that the defender has no images of moves means just as a trigger does, towards its own label. So only labels that clean
images have are suspected.

Augmentation moves means as well: the black borders of random crops outweigh a trigger by far. How the network was trained is
not known, so m_clean is taken from images cropped and flipped at random where that brings the early half of the network
far nearer to its running means than the images as they are.

An attacker who computes the BN statistics anew on clean images leaves nothing to see here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import require_finite, target_margin
from ..models.training import augment
from ..neurons.layers import Neurons
from .batch_norms import NormReader, class_weights, early_half, normalised_layers, running_statistics

POISON_RATE = 0.1
#: Share of the squared gap of the early means that may be left if training is to have cropped and flipped.
AUGMENTED = 0.5
#: Of the clean images, as many as are run under moved BN inputs.
IMAGES = 100


@dataclass(frozen=True)
class SuspectedTarget:
    """The label that the trigger is suspected to give, and the evidence.

    Attributes:
        target: the label.
        rise: how far its mean probability rises in the clearer of the two readings, in [-1, 1].
        margin: mean margin of it over the best other logit in the network with all BN inputs moved, on images of other
            labels.
        shift: root mean square of (m - m_clean) in running standard deviations, over the channels of the late half.
        means: m_trigger, by the name of each BN layer's node, float32 (channels,).
        deviations: running standard deviations, likewise.
    """

    target: int
    rise: float
    margin: float
    shift: float
    means: Mapping[str, Tensor]
    deviations: Mapping[str, Tensor]


@torch.no_grad()
def suspect_target(neurons: Neurons, images: Tensor, labels: Tensor) -> SuspectedTarget | None:
    """The suspected target of a network, or None where it has no batch normalisation that could tell.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    norms = normalised_layers(neurons)
    if not norms:
        return None
    running, deviations = running_statistics(neurons.graph, norms)
    device = next(neurons.graph.parameters()).device
    images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
    weights, few, few_weights = class_weights(labels), images[:IMAGES], class_weights(labels[:IMAGES])
    early, late = early_half(norms), [layer.node for layer in norms[len(norms) // 2 :]]

    plain = NormReader(neurons, weights).run_on(images)
    cropped = NormReader(neurons, weights).run_on(augment(images, torch.Generator().manual_seed(0)))
    gaps, augmented = (
        {name: mean - clean.mean(name, weights) for name, mean in running.items()} for clean in (plain, cropped)
    )
    off, augmented_off = (
        sum((these[name] / deviations[name]).square().mean().item() for name in early) for these in (gaps, augmented)
    )
    if augmented_off < AUGMENTED * off:
        gaps = augmented
    everywhere = {name: plain.mean(name, few_weights) + gap / POISON_RATE for name, gap in gaps.items()}
    moved = NormReader(neurons, few_weights, everywhere).run_on(few)

    aligned = NormReader(neurons, weights, {name: running[name] for name in early}).run_on(images)
    lacking = {name: (running[name] - aligned.mean(name, weights)) / POISON_RATE for name in late}
    steps = aligned.moves | lacking
    beyond = {name: aligned.mean(name, few_weights) + step for name, step in steps.items()}
    amplified = NormReader(neurons, few_weights, beyond).run_on(few)
    readings = [
        few_weights @ (after.logits.softmax(1) - before.logits[:IMAGES].softmax(1))
        for before, after in ((plain, moved), (aligned, amplified))
    ]
    require_finite("what the network answers with its BN inputs moved", *readings)
    present = torch.zeros_like(readings[0], dtype=torch.bool)
    present[labels.unique()] = True  # a class without clean images rises in any network: its images are what is missing
    rises = max(readings, key=lambda reading: _clearness(reading, present))
    target = _highest(rises, present)

    others = labels[:IMAGES] != target
    foreign = moved.logits[others] if others.any() else moved.logits
    shifts = torch.cat([gaps[name] / deviations[name] for name in late])
    return SuspectedTarget(
        target=target,
        rise=rises[target].item(),
        margin=target_margin(foreign, target).mean().item(),
        shift=shifts.square().mean().sqrt().item(),
        means={name: plain.mean(name, weights) + gap / POISON_RATE for name, gap in gaps.items()},
        deviations=deviations,
    )


def _highest(rises: Tensor, present: Tensor) -> int:
    """The label that rises most of those that clean images have."""
    return int(rises.masked_fill(~present, -torch.inf).argmax())


def _clearness(rises: Tensor, present: Tensor) -> float:
    """How far the largest rise of them stands out: over the largest other change."""
    target = _highest(rises, present)
    others = torch.cat([rises[:target], rises[target + 1 :]]).abs()
    return (rises[target] / others.max().clamp(min=1e-12)).item()
