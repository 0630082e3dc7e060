"""ANP, adversarial neuron pruning (Wu and Wang, NeurIPS 2021, arXiv:2110.14430).

Small relative changes of neurons make an infected network answer the target. ANP learns a mask m in [0, 1] of each
neuron that keeps the loss low under the worst of such changes (equations 3 and 4):

    min over m of  alpha * L(m * w, b) + (1 - alpha) * max over |d|, |x| <= eps of L((m + d) * w, (1 + x) * b)

with w and b the weight and bias of the neuron, of its batch normalisation where there is one. Neurons with a mask below
0.2 are pruned. Defaults are those of the published code: alpha 0.2, eps 0.4, one step of ascent from a random start,
SGD of rate 0.2 and momentum 0.9, 2,000 steps of 128 images, batch statistics in the normalisations. Unlike that code, this
one does not crop and flip the images, which not every data set bears, and clips a perturbation to the bound of the equation.

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import anp
    >>> model = load_infected("digits-badnets")
    >>> repaired = anp.prune(model.network, (model.clean.images, model.clean.labels), steps=2)
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    1.0
"""

from typing import Any

import torch
from torch import Tensor

from backdoor_gym.arguments import check_real, check_whole
from backdoor_gym.policies.thresholds import Threshold
from backdoor_gym.session.defender import Defender

from .rule import ACCURACY_BUDGET
from .soft_masks import LearnedMasks, SoftMasks, draw_batch, training_copy

BATCH = 128
LEARNING_RATE, MOMENTUM = 0.2, 0.9


class ANP(LearnedMasks):
    """Masks learned under the worst of small changes.

    Args:
        env: of ``Rule``.
        threshold: of ``Rule``; 0.8 is the published threshold of 0.2 on the mask.
        accuracy_budget: of ``Rule``.
        seed: of the images drawn and of the starts of the ascents.
        steps: of the learning.
        alpha: weight of the loss without perturbation.
        eps: bound of the relative perturbations.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import ANP
        >>> ANP(gym.make("backdoor_gym:BackdoorPrune-v0"), steps=2).threshold
        0.8
    """

    published = 0.8

    def __init__(
        self,
        env: Any,
        threshold: Threshold | None = None,
        accuracy_budget: float = ACCURACY_BUDGET,
        seed: int = 0,
        steps: int = 2_000,
        alpha: float = 0.2,
        eps: float = 0.4,
    ) -> None:
        super().__init__(env, threshold, accuracy_budget, seed)
        check_whole("steps", steps, 1)
        check_real("alpha", alpha, 0, 1)
        check_real("eps", eps, 0)
        self.steps, self.alpha, self.eps = self.learning = steps, alpha, eps

    def learn(self, defender: Defender) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        network = training_copy(defender)
        masks = SoftMasks(network, defender.neurons)
        optimizer = torch.optim.SGD([masks.mask], LEARNING_RATE, MOMENTUM)
        for _ in range(self.steps):
            images, labels = draw_batch(defender, BATCH, random)
            scale, shift = self.worst(masks, images, labels, random)
            perturbed = masks.loss(images, labels, scale, shift)
            optimizer.zero_grad()
            (self.alpha * masks.loss(images, labels) + (1 - self.alpha) * perturbed).backward()
            optimizer.step()
            masks.clip()
        return masks.mask

    def worst(self, masks: SoftMasks, images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Relative changes of all weights and biases after one step of ascent from a random start, at most eps."""
        size = 2 * len(masks.mask)
        start = ((2 * torch.rand(size, generator=random) - 1) * self.eps).to(masks.mask.device).requires_grad_()
        loss = masks.loss(images, labels, *start.chunk(2))
        (gradient,) = torch.autograd.grad(loss, start)
        scale, shift = (start + self.eps * gradient.sign()).clamp(-self.eps, self.eps).detach().chunk(2)
        return scale, shift


prune = ANP.prune
