"""RNP, reconstructive neuron pruning (Li et al., ICML 2023, arXiv:2305.14876, algorithm 1).

First the network unlearns: its weights climb the loss on clean images until the accuracy on them is at most 0.2. Backdoor
neurons survive, since clean images do not move them. Then a mask in [0, 1] of each neuron is learned that lets the
unlearned network answer clean images again. Neurons with a small mask are pruned from the network as it was. The
published code goes through all thresholds, so the threshold is "auto" here. Other defaults are those of that code:
unlearning by SGD of rate 0.01, momentum 0.9, weight decay 5e-4, at most 21 epochs, a tenth of the rate after 10 and again
after 20; recovering by 20 epochs of rate 0.2 and momentum 0.9 on 0.2 times the loss; batches of 128 (of 500 images: four
an epoch, so fewer images make four smaller ones). Unlike that code, this one does not crop and flip the images, which not
every data set bears, and clips the gradient of the unlearning at a norm of 20, as that code means to.

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import rnp
    >>> model = load_infected("digits-badnets")
    >>> repaired = rnp.prune(model.network, (model.clean.images, model.clean.labels), 0.9)
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    0.0
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from backdoor_gym.errors import DataError
from backdoor_gym.metrics import require_finite
from backdoor_gym.session.defender import Defender

from .soft_masks import LearnedMasks, SoftMasks, training_copy

BATCH, LEAST_BATCHES = 128, 4
MOMENTUM = 0.9
UNLEARNING_RATE, WEIGHT_DECAY, UNLEARNING_EPOCHS, MILESTONES, UNLEARNED = 0.01, 5e-4, 21, (10, 20), 0.2
RECOVERING_RATE, RECOVERING_EPOCHS, LOSS_WEIGHT = 0.2, 20, 0.2
#: Bound of the gradient's norm; without it the climb overflows.
LARGEST_GRADIENT = 20.0


class RNP(LearnedMasks):
    """Masks learned on what is left of the network when it has unlearned.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import RNP
        >>> RNP(gym.make("backdoor_gym:BackdoorPrune-v0")).threshold
        'auto'
    """

    def learn(self, defender: Defender) -> Tensor:
        if len(defender.images) < 2:
            raise DataError("RNP needs at least two clean images")
        random = torch.Generator().manual_seed(self.seed)
        network = training_copy(defender)
        unlearn(network, defender, random)
        masks = SoftMasks(network, defender.neurons)
        optimizer = torch.optim.SGD([masks.mask], RECOVERING_RATE, MOMENTUM)
        for _ in range(RECOVERING_EPOCHS):
            for images, labels in _epoch(defender, random):
                optimizer.zero_grad()
                (LOSS_WEIGHT * masks.loss(images, labels)).backward()
                optimizer.step()
                masks.clip()
        return masks.mask


def unlearn(network: fx.GraphModule, defender: Defender, random: torch.Generator) -> float:
    """Let all weights climb the loss, in place, until the accuracy of an epoch is at most ``UNLEARNED``; that accuracy."""
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, UNLEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(MILESTONES))
    share = 1.0
    for _ in range(UNLEARNING_EPOCHS):
        right = seen = 0
        for images, labels in _epoch(defender, random):
            optimizer.zero_grad()
            logits = network(images)
            require_finite("what the network answers while it unlearns", logits)
            (-F.cross_entropy(logits, labels)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            optimizer.step()
            right, seen = right + int((logits.argmax(1) == labels).sum()), seen + len(labels)
        schedule.step()
        share = right / seen
        if share <= UNLEARNED:
            break
    for parameter in parameters:
        parameter.requires_grad_(False)
    return share


def _epoch(defender: Defender, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """All clean images in a new order; a last batch of one image, which has no statistics, is left out."""
    device = next(defender.neurons.graph.parameters()).device
    size = min(BATCH, max(2, -(-len(defender.images) // LEAST_BATCHES)))
    for chosen in torch.randperm(len(defender.images), generator=random).split(size):
        if len(chosen) > 1:
            images = defender.images[chosen].to(device, memory_format=torch.channels_last)
            yield images, defender.labels[chosen].to(device)


prune = RNP.prune
