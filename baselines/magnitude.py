"""Magnitude pruning: the filters of the least weight first (Li et al., ICLR 2017, arXiv:1608.08710, section 3.1).

A rule of network compression, which knows nothing of backdoors. The paper ranks the L1 norms of the filters within a
layer and chooses how many by hand; here a norm is divided by the mean of its layer, so that all layers are ranked
together, and the threshold is "auto".

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import magnitude
    >>> model = load_infected("digits-badnets")
    >>> repaired = magnitude.prune(model.network, (model.clean.images, model.clean.labels), -0.5)
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    1.0
"""

import numpy as np
import torch

from backdoor_gym.session.defender import Defender

from .rule import Rule


class Magnitude(Rule):
    """Minus the L1 norm of a neuron's incoming weights over the mean of its layer; of several convolutions their sum.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import Magnitude
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = Magnitude(env, "budget").predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'conv1[6]'
    """

    reads_images = False

    def scores(self, defender: Defender) -> np.ndarray:
        scores = np.zeros(len(defender.neurons))
        for layer in defender.neurons.layers:
            norms = torch.zeros(layer.size, dtype=torch.float64)
            for feeder in layer.feeders:
                weight = defender.neurons.graph.get_submodule(feeder.module).weight
                assert isinstance(weight, torch.Tensor)
                norms.index_add_(0, *feeder.of_rows(weight.detach().double().cpu().abs().flatten(1).sum(1)))
            scores[layer.neurons] = -(norms / norms.mean().clamp(min=1e-12)).numpy()
        return scores


prune = Magnitude.prune
