"""Trigger inversion by the label alone, for every network.

For each label a mask and a pattern are sought with which the clean images of all other labels get it (Neural Cleanse, Wang et
al., IEEE S&P 2019, section IV): images * (1 - mask) + pattern * mask, by the least cross-entropy plus a weight times the
size of the mask. The weight of each label grows while ``SUCCESS`` of its images get the label and falls while they do
not, so that all masks end where they just do it. Training on triggered images made a short way to the attacker's label:
its mask is far smaller than those of the others. Every network has some mask for every label; ``lead``, the second smallest
over the smallest, is what speaks for a backdoor.

All labels are sought at once, in one batch; of many, after a short search, those of the smallest masks and a few others, for
the median. Labels that no clean image has are left out: where they come from cannot be told without images of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masking.sizes import Sizes
from ..metrics import danger, require_finite
from ..neurons.layers import Neurons
from .trigger_inversion import InvertedTrigger

#: Images of each label in one step of the search, steps, and step size of Adam in units of the logits of mask and pattern.
BATCH, STEPS, RATE = 8, 32, 0.6
#: The same images where those of one pass of an image take more bytes than this.
FEW, LARGE = 4, 64 << 20
#: Logit of the mask at the beginning.
BEGIN = -2.0
#: Weight of a mask that covers the whole image at the beginning, its bounds, and how it changes in a step.
WEIGHT, LEAST_WEIGHT, MOST_WEIGHT, GROWTH = 20.0, 0.1, 1000.0, 1.3
#: Share of the images that a mask shall give its label.
SUCCESS = 0.9
#: Last steps over which sizes and successes are a mean, and least success that a size is divided by.
LAST, LEAST_SUCCESS = 8, 0.2
#: Masks that are sought for one label alone, in how many steps, and deviation of the logits that all but the first begin with:
#: in a pruned network the true trigger is found late.
SEVERAL, LONG_STEPS, APART = 4, 64, 1.0
#: Labels that a comparison needs: of fewer the smallest mask is smaller than the median in any network.
LEAST_LABELS = 5
#: Size of a mask, over the median of all labels in the whole network, from which on it is like that of any label.
ORDINARY = 0.6
#: Clean images that these are shown on.
SHOWN_ON = 40
#: Labels that are sought of many, and of these how many with the smallest masks in the short search.
MOST_LABELS, SMALLEST = 12, 6
#: Steps of that search, images in one of them, and last steps that its sizes are a mean over.
SHORT_STEPS, SHORT_IMAGES, SHORT_LAST = 12, 192, 4


Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LabelEvidence:
    """How little of an image must change to give each label.

    Attributes:
        labels: those that were sought, int64 (k,).
        sizes: of their masks, a share of the image, over their success, float32 (k,).
    """

    labels: Tensor
    sizes: Tensor

    @property
    def target(self) -> int:
        """The label of the smallest mask."""
        return int(self.labels[self.sizes.argmin()])

    @property
    def median(self) -> float:
        """The median size."""
        return self.sizes.median().item()

    def points_to(self, label: int) -> bool:
        """Whether the smallest mask is that of the label, and out of the ordinary."""
        return self.target == label and self.ratio < ORDINARY

    @property
    def ratio(self) -> float:
        """The smallest size over the median."""
        return self.sizes.min().item() / self.median

    @property
    def lead(self) -> float:
        """The second smallest size over the smallest."""
        first, second = self.sizes.sort().values[:2].tolist()
        return second / first


def compare_labels(neurons: Neurons, images: Tensor, labels: Tensor) -> LabelEvidence | None:
    """The smallest mask of each label; None where the clean images are of fewer than ``LEAST_LABELS`` labels.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    device = next(neurons.graph.parameters()).device
    images, labels = images.to(device), labels.to(device)
    present = labels.unique()
    if len(present) < LEAST_LABELS:
        return None
    if len(present) > MOST_LABELS:
        each = max(1, min(FEW, SHORT_IMAGES // len(present)))
        short = _MaskSearch(neurons.graph, images, labels, present, each).go(SHORT_STEPS, SHORT_LAST)
        present = present[_smallest_and_others(short)]
    sizes = _MaskSearch(neurons.graph, images, labels, present, _batch(neurons, images)).go(STEPS, LAST)
    return LabelEvidence(present.cpu(), sizes.cpu())


def invert_label(
    neurons: Neurons, images: Tensor, labels: Tensor, target: int, network: Network | None = None, seed: int = 0
) -> tuple[InvertedTrigger, Tensor]:
    """Several masks and patterns that give one label, each from another beginning, and their sizes, float32 (``SEVERAL``,).

    What is pruned away for a single mask may leave the true trigger, which differs from it.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
        target: the label; some images must be of another one.
        network: where the masks are sought, if not in the network itself: in one that was pruned.
        seed: of the beginnings.
    """
    network = network or neurons.graph
    device = next(neurons.graph.parameters()).device
    images, labels = images.to(device), labels.to(device)
    sought = torch.full((SEVERAL,), target, device=device)
    search = _MaskSearch(network, images, labels, sought, _batch(neurons, images), seed, APART)
    sizes = search.go(LONG_STEPS, LAST)
    foreign = images[labels != target][:SHOWN_ON].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        triggered = search.stamp(foreign, slice(None)).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        level = danger(network(triggered), target)
    trigger = InvertedTrigger(
        target,
        ("mask",) * SEVERAL,
        foreign,
        triggered,
        size=(triggered - foreign.repeat(SEVERAL, 1, 1, 1)).abs().mean().item(),
        error=0.0,
        evidence=level,
    )
    return trigger, sizes.cpu()


def _batch(neurons: Neurons, images: Tensor) -> int:
    """Images of each label in one step."""
    return FEW if Sizes(neurons.graph, images[:1]).image_bytes > LARGE else BATCH


class _MaskSearch:
    """Masks and patterns of several labels."""

    def __init__(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        sought: Tensor,
        batch: int,
        seed: int = 0,
        apart: float = 0.0,
    ) -> None:
        self._network, self._images, self._sought, self._batch = network, images, sought, batch
        self._random = torch.Generator().manual_seed(seed)
        shape = (len(sought), *images.shape[1:])
        beginnings = apart * torch.randn(2, *shape, generator=self._random).to(images.device)
        beginnings[:, 0] = 0
        self._mask = (BEGIN + beginnings[0, :, :1]).requires_grad_()
        self._pattern = beginnings[1].clone().requires_grad_()
        self._foreign = [torch.nonzero(labels != label).flatten() for label in sought]

    def stamp(self, images: Tensor, place: int | slice) -> Tensor:
        """Images (n, C, H, W) with the trigger of one label, or (k, n, C, H, W) with those of all."""
        mask, pattern = torch.sigmoid(self._mask), torch.sigmoid(self._pattern)
        if isinstance(place, slice):
            mask, pattern = mask[place, None], pattern[place, None]
        else:
            mask, pattern = mask[place], pattern[place]
        return images * (1 - mask) + pattern * mask

    @torch.enable_grad()
    def go(self, steps: int, last: int) -> Tensor:
        """The size of each label's mask as a share of the image, over its success, both means of the last steps, float32 (k,)."""
        count, batch = len(self._sought), self._batch
        optimizer = torch.optim.Adam([self._mask, self._pattern], RATE, betas=(0.5, 0.9))
        targets = self._sought.repeat_interleave(batch)
        weights = self._mask.new_full((count,), WEIGHT)
        sizes, successes = [], []
        mask, pattern = self._mask.detach().clone(), self._pattern.detach().clone()  # the last ones that worked
        for step in range(steps):
            chosen = torch.stack([self._draw(foreign) for foreign in self._foreign])
            stamped = self.stamp(self._images[chosen], slice(None)).flatten(0, 1)
            logits = self._network(stamped.contiguous(memory_format=torch.channels_last))
            costs = F.cross_entropy(logits, targets, reduction="none").view(count, batch).mean(1)
            size = torch.sigmoid(self._mask).mean((1, 2, 3))
            loss = (costs + weights * size).sum()
            # What only looks at which value is the largest has no derivative.
            gradients = torch.autograd.grad(loss, [self._mask, self._pattern], materialize_grads=True)
            require_finite("the loss of a search for the trigger", loss, *gradients)
            success = (logits.detach().argmax(1) == targets).float().view(count, batch).mean(1)
            keep = (success >= SUCCESS) | (step < steps - last)
            mask[keep], pattern[keep] = self._mask.detach()[keep], self._pattern.detach()[keep]
            self._mask.grad, self._pattern.grad = gradients
            optimizer.step()
            weights = (weights * torch.where(success >= SUCCESS, GROWTH, 1 / GROWTH)).clamp(LEAST_WEIGHT, MOST_WEIGHT)
            sizes.append(size.detach())
            successes.append(success)
        self._mask, self._pattern = mask, pattern
        size, success = torch.stack(sizes[-last:]).mean(0), torch.stack(successes[-last:]).mean(0)
        return size / success.clamp(min=LEAST_SUCCESS)

    def _draw(self, foreign: Tensor) -> Tensor:
        """Some images of other labels, int64 (batch,); again and again where there are fewer."""
        if len(foreign) < self._batch:
            return foreign[torch.randint(len(foreign), (self._batch,), generator=self._random).to(foreign.device)]
        return foreign[torch.randperm(len(foreign), generator=self._random)[: self._batch].to(foreign.device)]


def _smallest_and_others(sizes: Tensor) -> Tensor:
    """Places of the smallest sizes, and of as many others evenly over the rest, int64 (MOST_LABELS,)."""
    order = sizes.argsort(stable=True)
    others = torch.linspace(SMALLEST, len(sizes) - 1, MOST_LABELS - SMALLEST, device=sizes.device).round().long()
    return torch.cat([order[:SMALLEST], order[others]])
