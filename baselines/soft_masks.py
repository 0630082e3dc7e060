"""Masks between 0 and 1 on the weights of each neuron, to be learned."""

import copy
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from backdoor_gym.arguments import check_whole
from backdoor_gym.metrics import require_finite
from backdoor_gym.neurons.layers import Neurons
from backdoor_gym.policies.thresholds import Threshold
from backdoor_gym.session.defender import Defender

from .rule import ACCURACY_BUDGET, Rule


class LearnedMasks(Rule):
    """A score is one minus a learned mask. What was learned once of a network is remembered.

    Args:
        env: of ``Rule``.
        threshold: of ``Rule``.
        accuracy_budget: of ``Rule``.
        seed: of all that is drawn.

    Attributes:
        learning: further settings of the learning.
    """

    learning: tuple[float, ...] = ()

    def __init__(
        self,
        env: Any,
        threshold: Threshold | None = None,
        accuracy_budget: float = ACCURACY_BUDGET,
        seed: int = 0,
    ) -> None:
        super().__init__(env, threshold, accuracy_budget)
        check_whole("seed", seed)
        self.seed = seed

    def scores(self, defender: Defender) -> np.ndarray:
        settings = (type(self), self.seed, *self.learning)
        mask: Tensor = defender.memory.recall(settings, lambda: self.learn(defender).detach().double().cpu())
        return 1 - mask.numpy()

    @abstractmethod
    def learn(self, defender: Defender) -> Tensor:
        """The mask of each neuron, float (neurons,) from 0 to 1, learned anew."""


class SoftMasks:
    """The loss of a network, from ``training_copy``, whose neurons' weights are multiplied by masks.

    Weight and bias of a neuron are those of its batch normalisation, or of its convolution or linear layer where there
    is none. The bias is not masked: ANP and RNP leave it.

    Attributes:
        mask: of each neuron, float32 (neurons,), ones at first.
    """

    def __init__(self, network: fx.GraphModule, neurons: Neurons) -> None:
        self.network, self.layers = network, neurons.layers
        device = next(network.parameters()).device
        self.mask = torch.ones(len(neurons), device=device, requires_grad=True)

    def loss(self, images: Tensor, labels: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Cross-entropy with weights times (mask + scale) and biases times (1 + shift), both float32 (neurons,) or None."""
        changed = {}
        for layer in self.layers:
            factor = self.mask[layer.neurons]
            if scale is not None:
                factor = factor + scale[layer.neurons]
            for part in layer.parts:
                module = self.network.get_submodule(part.module)
                weight, bias = module.weight, module.bias
                assert isinstance(weight, Tensor)
                changed[f"{part.module}.weight"] = weight * part.by_row(factor, 1).view(-1, *[1] * (weight.ndim - 1))
                if shift is not None and isinstance(bias, Tensor):
                    changed[f"{part.module}.bias"] = bias * (1 + part.by_row(shift[layer.neurons], 0))
        loss = F.cross_entropy(functional_call(self.network, changed, (images,)), labels)
        require_finite("the loss under masks", loss)
        return loss

    @torch.no_grad()
    def clip(self) -> None:
        """Bring the masks back into [0, 1]."""
        self.mask.clamp_(0, 1)


def training_copy(defender: Defender) -> fx.GraphModule:
    """A traced copy of the network to learn with: batch normalisations take the statistics of the batch."""
    network = copy.deepcopy(defender.neurons.graph)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return network


def draw_batch(defender: Defender, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many clean images and labels, drawn with replacement, on the network's device."""
    device = next(defender.neurons.graph.parameters()).device
    chosen = torch.randint(len(defender.images), (size,), generator=random)
    images = defender.images[chosen].to(device, memory_format=torch.channels_last)
    return images, defender.labels[chosen].to(device)
