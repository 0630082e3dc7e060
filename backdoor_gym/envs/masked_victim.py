"""A victim without some of its neurons: accuracy, suspected danger and, where the trigger is known, ASR."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..metrics import accuracy, attack_success, danger
from ..pruning.masked import KEPT_BYTES, MaskedNetwork
from ..zoo.datasets import LabelledImages
from ..zoo.targets import target_labels
from .victim import Victim

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


class MaskedVictim:
    """A victim as an episode leaves it; activations of what is kept are reused.

    ``begin`` makes one for an episode. All of one model share the activations of the whole network while any of them lives.

    Args:
        victim: the model.
        score_samples: how many triggered test images ASR and RA are measured on, and half of how many clean ones the
            accuracy on test images; 0 for none.
    """

    def __init__(self, victim: Victim, score_samples: int = SCORE_SAMPLES) -> None:
        self.victim = victim
        self.score_samples = score_samples
        self._origin: MaskedVictim | None = None  # keeps alive what is shared
        device, inverted = victim.options.device, victim.inverted
        fragile, clean = torch.from_numpy(victim.fragile), victim.clean
        #: The fragile clean images, then the others, with their labels; both together keep what one network may.
        self._clean = [
            (
                MaskedNetwork(victim.neurons, clean.images[part], device, KEPT_BYTES * int(part.sum()) // len(clean)),
                clean.labels[part].to(device),
            )
            for part in (fragile, ~fragile)
            if part.any()
        ]
        self._inverted = None if inverted is None else MaskedNetwork(victim.neurons, inverted.images, device)
        self._triggered = self._test = None
        if len(self.triggered[0]):
            self._triggered = MaskedNetwork(victim.neurons, self.triggered[0], device)
        if self.tested is not None:
            self._test = MaskedNetwork(victim.neurons, self.tested.images, device)

    @classmethod
    def begin(cls, victim: Victim, score_samples: int = SCORE_SAMPLES) -> Self:
        """One with nothing pruned, made from what there is of that model."""
        with victim.preparing:
            known = _WHOLE.setdefault(victim, WeakValueDictionary())
            whole = known.get(score_samples)
            if whole is None:
                whole = known[score_samples] = cls(victim, score_samples)
            return whole._fork()

    def _fork(self) -> Self:
        twin = copy(self)
        twin._origin = self
        twin._clean = [(network.fork(), labels) for network, labels in self._clean]
        twin._inverted, twin._triggered, twin._test = (
            None if network is None else network.fork() for network in (self._inverted, self._triggered, self._test)
        )
        return twin

    def figures(self, pruned: np.ndarray, score: bool = True) -> Figures:
        """Figures of the network without the pruned units, bool (units,); without ``score`` on the clean images alone."""
        mask = self.victim.neuron_mask(pruned)
        clean = self.clean(pruned)
        assert clean is not None
        figures = Figures(*clean, self.suspected_danger(pruned))
        if score and self._triggered is not None:
            asr, ra, true_danger = self._score(self._triggered.logits(mask))
            figures = replace(figures, asr=asr, ra=ra, danger=true_danger)
        if score and self._test is not None and self.tested is not None:
            test_logits = self._test.logits(mask)
            figures = replace(figures, test_acc=accuracy(test_logits, self.tested.labels.to(test_logits.device)))
        return figures

    def clean(self, pruned: np.ndarray, least_acc: float = 0.0) -> tuple[float, float] | None:
        """Accuracy and mean cross-entropy on the clean images alone, without the pruned units, bool (units,).

        None where the accuracy is below ``least_acc``: most prunes that cost so much are found out by the fragile images.
        """
        mask = self.victim.neuron_mask(pruned)
        count, wrong, loss = len(self.victim.clean), 0, 0.0
        for network, labels in self._clean:
            logits = network.logits(mask)
            wrong += int((logits.argmax(1) != labels).sum())
            if 1 - wrong / count < least_acc:
                return None
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
        return 1 - wrong / count, loss / count

    def suspected_danger(self, pruned: np.ndarray) -> float:
        """``Figures.suspected_danger`` of the network without the pruned units, bool (units,)."""
        inverted = self.victim.inverted
        if self._inverted is None or inverted is None:
            return 0.0
        return danger(self._inverted.logits(self.victim.neuron_mask(pruned)), inverted.target)

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
        model, count = self.victim.model, self.score_samples
        if model.test is None or model.trigger is None or model.target is None or count == 0:
            return torch.empty(0), torch.empty(0)
        test = model.test.first(4 * count)  # not the whole test split, which may be large
        wanted = target_labels(test.labels, model.target, model.num_classes)
        others = torch.nonzero(test.labels != wanted).flatten()[:count]
        return model.trigger(test.images[others]), test.labels[others]

    @cached_property
    def tested(self) -> LabelledImages | None:
        """Clean test images that the accuracy is scored on; None where there are none."""
        test, count = self.victim.model.test, 2 * self.score_samples
        return test.first(count) if test is not None and count else None

    def _score(self, logits: Tensor) -> tuple[float, float, float]:
        model, labels = self.victim.model, self.triggered[1].to(logits.device)
        assert model.target is not None
        wanted = target_labels(labels, model.target, model.num_classes)
        return attack_success(logits, wanted), accuracy(logits, labels), danger(logits, wanted)

    def _networks(self) -> Iterator[MaskedNetwork]:
        clean = [network for network, _ in self._clean]
        everyone = (*clean, self._inverted, self._triggered, self._test)
        return (network for network in everyone if network is not None)


#: Whole networks by model and ``score_samples``, for as long as an environment uses them.
_WHOLE: WeakKeyDictionary[Victim, WeakValueDictionary[int, Any]] = WeakKeyDictionary()
