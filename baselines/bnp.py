"""BNP, pruning by BN statistics (Zheng et al., NeurIPS 2022, "Pre-activation Distributions Expose Backdoor Neurons").

The running statistics of a batch normalisation come from poisoned training: where triggered images move a neuron, its
pre-activations on clean images have another distribution. With both taken as normal, the divergence of a channel is

    KL = log(s / c) + (c^2 + (m_c - m)^2) / (2 s^2) - 1/2

where m, s are the running mean and standard deviation and m_c, c those of the clean images (section 4.3). Neurons above
mean + u * standard deviation of their layer are pruned; the published code has u = 3.

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import bnp
    >>> model = load_infected("digits-badnets")
    >>> repaired = bnp.prune(model.network, (model.clean.images, model.clean.labels))
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    0.06
"""

import numpy as np
import torch
from torch import nn

from backdoor_gym.analysis.features import standardise
from backdoor_gym.session.defender import Defender

from .pre_activations import moments
from .rule import Rule


class BNP(Rule):
    """The divergence in standard deviations over its layer; neurons without batch normalisation are left.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import BNP
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = BNP(env).predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer4.0.conv1[20]'
    """

    published = 3.0
    scored = "neurons with batch normalisation"

    def scores(self, defender: Defender) -> np.ndarray:
        scores = np.full(len(defender.neurons), -np.inf)
        clean = moments(defender)
        for layer in defender.neurons.layers:
            if not layer.normalised:
                continue
            norm = defender.neurons.graph.get_submodule(layer.module)
            assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            running = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
            scores[layer.neurons] = standardise(kl_divergence(*clean[layer.node], *running)).numpy()
        return scores


def kl_divergence(
    mean: torch.Tensor, variance: torch.Tensor, other_mean: torch.Tensor, other_variance: torch.Tensor
) -> torch.Tensor:
    """Of N(mean, variance) from N(other_mean, other_variance), elementwise."""
    # A channel that is constant on the clean images would be infinitely far.
    variance, other_variance = variance.clamp(min=1e-12), other_variance.clamp(min=1e-12)
    ratio = (variance + (mean - other_mean) ** 2) / other_variance
    return 0.5 * (other_variance.log() - variance.log() + ratio - 1)


prune = BNP.prune
