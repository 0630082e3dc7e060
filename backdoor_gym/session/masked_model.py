"""A prepared without some of its neurons: accuracy, suspected danger and, where the trigger is known, ASR."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from math import isfinite
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks.targets import target_labels
from ..data.datasets import LabelledImages
from ..errors import WeightsError
from ..masking.masked import KEPT_BYTES, MaskedNetwork
from ..metrics import accuracy, attack_success, danger, target_margin
from .prepared_model import GRADIENT_IMAGES, MaskGradients, PreparedModel

#: Standard errors by which a loss may be larger than its mean on the clean images, to be within the budget all the same.
STANDARD_ERRORS = 1.0
#: Triggered test images that ASR and RA are measured on where nothing else is said.
SCORE_SAMPLES = 256


@dataclass(frozen=True)
class Figures:
    """A masked network on the defender's clean images and, where the trigger is known, on triggered images.

    Attributes:
        acc: accuracy on the clean images.
        loss: mean cross-entropy on them.
        suspected_danger: ``metrics.danger`` of the suspected target on clean images of other labels that bear the inverted
            trigger; 0 where there is none.
        asr: share of triggered images that get the target label.
        ra: share of them that get their true label.
        danger: ``metrics.danger`` of the target on triggered images.
        test_acc: accuracy on clean test images.
    """

    acc: float
    loss: float
    suspected_danger: float = 0.0
    asr: float | None = None
    ra: float | None = None
    danger: float | None = None
    test_acc: float | None = None


@dataclass(frozen=True)
class Lost:
    """The mean fall of the true label's probability on clean images.

    It moves with every prune, where a count of answers stays as it is until an image changes sides. On images that prunes were
    not chosen by, it is the accuracy that is expected to be lost.

    Attributes:
        mean: of the fall, a share.
        error: standard error of the mean.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, falls: Tensor) -> Self:
        """Of the fall on each image, float32 (n,)."""
        falls = falls.double()
        error = falls.std().item() / len(falls) ** 0.5 if len(falls) > 1 else 0.0
        return cls(falls.mean().item(), error)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"

    @property
    def at_most(self) -> float:
        """``STANDARD_ERRORS`` above the mean."""
        return self.mean + STANDARD_ERRORS * self.error


NOTHING_LOST = Lost(0.0, 0.0)


class MaskedModel:
    """A prepared as an episode leaves it; activations of what is kept are reused.

    ``begin`` makes one for an episode. All of one model share the activations of the whole network while any of them lives.

    Args:
        prepared: the model.
        score_samples: how many triggered test images ASR and RA are measured on, and half of how many clean ones the
            accuracy on test images; 0 for none.
        holds_out: whether ``choosing`` and ``gradients`` look at one half of the clean images alone, and ``lost`` at the other.
    """

    def __init__(self, prepared: PreparedModel, score_samples: int = SCORE_SAMPLES, holds_out: bool = False) -> None:
        self.prepared = prepared
        self.score_samples = score_samples
        self.holds_out = holds_out
        self._origin: MaskedModel | None = None  # keeps alive what is shared
        inverted = prepared.inverted
        network = partial(MaskedNetwork, prepared.neurons, device=prepared.options.device, fill=prepared.fill)
        fragile, clean = torch.from_numpy(prepared.fragile), prepared.clean
        first, foreign = torch.arange(len(clean)) < GRADIENT_IMAGES, _foreign(prepared)
        held_out = every_second(clean.labels) if holds_out else torch.zeros(len(clean), dtype=torch.bool)
        #: The fragile clean images, then the others, of both those that are held out and those that derivatives are taken on
        #: apart; all together keep what one network may.
        self._clean: list[_Part] = []
        for is_fragile, is_held_out, is_first in product((True, False), repeat=3):
            part = (fragile == is_fragile) & (held_out == is_held_out) & (first == is_first)
            for_gradients = is_first and not is_held_out
            if part.any():
                masked = network(clean.images[part], kept_bytes=KEPT_BYTES * int(part.sum()) // len(clean))
                rows = None if foreign is None else torch.nonzero(foreign[part]).flatten()
                labels = clean.labels[part].to(masked.device)
                whole = masked.logits(np.ones(len(prepared.neurons), dtype=bool))
                chances = _chances(whole, labels)
                self._clean.append(_Part(masked, labels, is_held_out, for_gradients, rows, chances))
        #: The images that ``MaskGradients.clean_pull`` is taken on, where they are none of the clean ones.
        self._corrected = None
        if inverted is not None and foreign is None:
            self._corrected = network(inverted.clean)
        self._inverted = None if inverted is None else network(inverted.images)
        self._clean_count = len(clean)
        self._triggered = self._test = None
        if len(self.triggered[0]):
            assert prepared.model.target is not None
            self._triggered = network(self.triggered[0])
            self._true_labels = self.triggered[1].to(self._triggered.device)
            self._aims = target_labels(self._true_labels, prepared.model.target, prepared.model.num_classes)
        if self.tested is not None:
            self._test = network(self.tested.images)
            self._test_labels = self.tested.labels.to(self._test.device)

    @classmethod
    def begin(cls, prepared: PreparedModel, score_samples: int = SCORE_SAMPLES, holds_out: bool = False) -> Self:
        """One with nothing pruned, made from what there is of that model."""
        with prepared.preparing:
            known = _WHOLE.setdefault(prepared, WeakValueDictionary())
            whole = known.get((score_samples, holds_out))
            if whole is None:
                whole = known[score_samples, holds_out] = cls(prepared, score_samples, holds_out)
            return whole._fork()

    def _fork(self) -> Self:
        twin = copy(self)
        twin._origin = self
        twin._clean = [replace(part, network=part.network.fork()) for part in self._clean]
        twin._inverted, twin._triggered, twin._test, twin._corrected = (
            None if network is None else network.fork()
            for network in (self._inverted, self._triggered, self._test, self._corrected)
        )
        return twin

    @cached_property
    def pass_bytes(self) -> int:
        """Size of all values of a pass of the images that every step may look at: the clean and the inverted ones."""
        looked_at = [part.network for part in self._clean] + ([] if self._inverted is None else [self._inverted])
        return sum(network.pass_bytes for network in looked_at)

    def figures(self, pruned: np.ndarray, score: bool = True) -> Figures:
        """Figures of the network without the pruned units, bool (units,); without ``score`` on the clean images alone.

        Raises:
            WeightsError: its answers to them are not finite.
        """
        mask = self.prepared.neuron_mask(pruned)
        clean = self.clean(pruned)
        if clean is None:
            raise WeightsError(f"without these units {self.prepared.name} gives logits that are not finite")
        figures = Figures(*clean, self.suspected_danger(pruned))
        if score and self._triggered is not None:
            logits = self._triggered.logits(mask)
            asr, ra = attack_success(logits, self._aims), accuracy(logits, self._true_labels)
            figures = replace(figures, asr=asr, ra=ra, danger=danger(logits, self._aims))
        if score and self._test is not None:
            figures = replace(figures, test_acc=accuracy(self._test.logits(mask), self._test_labels))
        return figures

    def clean(self, pruned: np.ndarray, least_acc: float = 0.0) -> tuple[float, float] | None:
        """Accuracy and mean cross-entropy on the clean images alone, without the pruned units, bool (units,).

        None where the accuracy is below ``least_acc`` (most prunes that cost so much are found out by the fragile images), or
        where the cross-entropy is not finite.
        """
        mask = self.prepared.neuron_mask(pruned)
        count, wrong, loss = self._clean_count, 0, 0.0
        for part in self._clean:
            logits = part.network.logits(mask)
            wrong += int((logits.argmax(1) != part.labels).sum())
            if 1 - wrong / count < least_acc:
                return None
            loss += part.loss(logits).item()
        return (1 - wrong / count, loss / count) if isfinite(loss) else None

    def choosing(self, pruned: np.ndarray, most_lost: float) -> tuple[float, float] | None:
        """The same on the clean images that are not held out; None where they lose more than ``most_lost`` (``Lost.mean``)."""
        mask = self.prepared.neuron_mask(pruned)
        parts = [part for part in self._clean if not part.held_out]
        count, wrong, loss, lost = sum(len(part.labels) for part in parts), 0, 0.0, 0.0
        for part in parts:
            logits = part.network.logits(mask)
            wrong += int((logits.argmax(1) != part.labels).sum())
            loss += part.loss(logits).item()
            lost += part.falls(logits).sum().item()
        return (1 - wrong / count, loss / count) if isfinite(loss) and lost / count <= most_lost else None

    def lost(self, pruned: np.ndarray) -> "Lost":
        """What is lost without the pruned units, bool (units,), by the images that are held out; by all where none are."""
        mask = self.prepared.neuron_mask(pruned)
        parts = [part for part in self._clean if part.held_out] or self._clean
        return Lost.of(torch.cat([part.falls(part.network.logits(mask)) for part in parts]))

    def gradients(self, pruned: np.ndarray) -> MaskGradients:
        """``PreparedModel.gradients``, up to rounding, from the activations that are kept; best after ``keep`` of that mask.

        ``harm`` is without the images that are held out.
        """
        prepared, inverted = self.prepared, self.prepared.inverted
        mask, zeros = prepared.neuron_mask(pruned), np.zeros(len(prepared))
        parts = [part for part in self._clean if part.for_gradients]
        count = sum(len(part.labels) for part in parts)
        harm = torch.zeros(len(mask), device=prepared.options.device)
        for part in parts:
            harm -= part.network.mask_gradient(mask, part.loss) / count
        if inverted is None or self._inverted is None:
            return MaskGradients(zeros, prepared.by_unit(harm), zeros)

        def margin(logits: Tensor) -> Tensor:
            return target_margin(logits, inverted.target).sum()

        pull = self._inverted.mask_gradient(mask, margin) / len(self._inverted)
        if self._corrected is not None:
            clean_pull = self._corrected.mask_gradient(mask, margin)
        else:
            clean_pull = torch.zeros_like(harm)
            for part in self._clean:
                if part.foreign is not None and len(part.foreign):
                    clean_pull += part.network.mask_gradient(mask, margin, part.foreign)
        gradients = (pull, harm, clean_pull / len(inverted.clean))
        return MaskGradients(*(prepared.by_unit(gradient) for gradient in gradients))

    def suspected_danger(self, pruned: np.ndarray) -> float:
        """``Figures.suspected_danger`` of the network without the pruned units, bool (units,)."""
        inverted = self.prepared.inverted
        if self._inverted is None or inverted is None:
            return 0.0
        return danger(self._inverted.logits(self.prepared.neuron_mask(pruned)), inverted.target)

    def leading_danger(self, pruned: np.ndarray) -> float:
        """The same of the first family alone, which explains the network best: families are alternatives."""
        inverted = self.prepared.inverted
        if self._inverted is None or inverted is None:
            return 0.0
        logits = self._inverted.logits(self.prepared.neuron_mask(pruned))
        return danger(logits[: len(inverted.clean)], inverted.target)

    def keep(self) -> None:
        """Let later figures start from the activations of the last ones."""
        for network in self._networks():
            network.keep()

    def restart(self) -> None:
        """Start again from the whole network."""
        for network in self._networks():
            network.reset()

    @cached_property
    def triggered(self) -> tuple[Tensor, Tensor]:
        """Triggered test images of other classes than the target, and their true labels; empty where unknown."""
        model, count = self.prepared.model, self.score_samples
        if model.test is None or model.trigger is None or model.target is None or count == 0:
            return torch.empty(0), torch.empty(0)
        test = model.test.first(4 * count)  # not the whole test split, which may be large
        targets = target_labels(test.labels, model.target, model.num_classes)
        others = torch.nonzero(test.labels != targets).flatten()[:count]
        return model.trigger(test.images[others]), test.labels[others]

    @cached_property
    def tested(self) -> LabelledImages | None:
        """Clean test images that the accuracy is scored on; None where there are none."""
        test, count = self.prepared.model.test, 2 * self.score_samples
        return test.first(count) if test is not None and count else None

    def _networks(self) -> Iterator[MaskedNetwork]:
        clean = [part.network for part in self._clean]
        everyone = (*clean, self._inverted, self._triggered, self._test, self._corrected)
        return (network for network in everyone if network is not None)


@dataclass(frozen=True)
class _Part:
    """Some of the clean images under a mask.

    Attributes:
        network: of them.
        labels: int64 (n,), where the network is.
        held_out: whether they only tell what is lost.
        for_gradients: whether they are among those that the derivatives are taken on.
        foreign: which of them ``MaskGradients.clean_pull`` is taken on, int64; None where on others.
        chances: probability of the true label in the whole network, float32 (n,).
    """

    network: MaskedNetwork
    labels: Tensor
    held_out: bool
    for_gradients: bool
    foreign: Tensor | None
    chances: Tensor

    def falls(self, logits: Tensor) -> Tensor:
        """How far the probability of the true label falls under these logits, float32 (n,)."""
        return self.chances - _chances(logits, self.labels)

    def loss(self, logits: Tensor) -> Tensor:
        """Sum of the cross-entropy."""
        return F.cross_entropy(logits, self.labels, reduction="sum")


def _chances(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true labels, float32 (n,)."""
    return logits.softmax(1).gather(1, labels[:, None]).squeeze(1)


def every_second(labels: Tensor) -> Tensor:
    """Every second image of each label, bool (n,): one half, of the same labels as the other."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[labels.argsort(stable=True)[1::2]] = True
    return chosen


def _foreign(prepared: PreparedModel) -> Tensor | None:
    """Which clean images are those that the trigger was sought in, bool (n,); None where they were corrected first."""
    inverted, clean = prepared.inverted, prepared.clean.first(GRADIENT_IMAGES)
    if inverted is None:
        return None
    foreign = torch.zeros(len(prepared.clean), dtype=torch.bool)
    foreign[torch.nonzero(clean.labels != inverted.target).flatten()[: len(inverted.clean)]] = True
    return foreign if torch.equal(prepared.clean.images[foreign], inverted.clean.cpu()) else None


#: Whole networks by model, ``score_samples`` and ``holds_out``, for as long as a session uses them.
_WHOLE: WeakKeyDictionary[PreparedModel, WeakValueDictionary[tuple[int, bool], Any]] = WeakKeyDictionary()
