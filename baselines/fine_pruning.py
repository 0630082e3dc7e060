"""Fine-Pruning, its pruning part (Liu, Dolan-Gavitt and Garg, RAID 2018, arXiv:1805.12185, section 3.1).

Neurons of the last convolutional layer are pruned in increasing order of their mean activation on clean images, until
the accuracy falls below what the defender tolerates. The paper leaves that threshold to the defender, so it is "auto"
here. The fine-tuning that follows in the paper is left out.

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import fine_pruning
    >>> model = load_infected("digits-badnets")
    >>> repaired = fine_pruning.prune(model.network, (model.clean.images, model.clean.labels), -0.1)
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    1.0
"""

import numpy as np
from torch import nn

from backdoor_gym.analysis.features import observe
from backdoor_gym.neurons.layers import NeuronLayer
from backdoor_gym.session.defender import Defender

from .rule import Rule


class FinePruning(Rule):
    """Minus the mean activation (of its positive part) on the clean images, in the last convolutional layer alone.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import FinePruning
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = FinePruning(env, "budget").predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer4.1.conv2[35]'
    """

    def scores(self, defender: Defender) -> np.ndarray:
        scores = np.full(len(defender.neurons), -np.inf)
        index = last_convolution(defender)
        observed = observe(defender.neurons, defender.images, defender.labels)[index]
        scores[defender.neurons.layers[index].neurons] = -observed["activation"].cpu().numpy()
        return scores


def last_convolution(defender: Defender) -> int:
    """Index of the last layer that a convolution wider than one pixel feeds, so of no shortcut; else of the last layer."""

    def is_wide(layer: NeuronLayer) -> bool:
        convs = [defender.neurons.graph.get_submodule(feeder.module) for feeder in layer.feeders]
        return any(isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1 for conv in convs)

    wide = [index for index, layer in enumerate(defender.neurons.layers) if is_wide(layer)]
    return wide[-1] if wide else len(defender.neurons.layers) - 1


prune = FinePruning.prune
