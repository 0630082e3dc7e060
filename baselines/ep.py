"""EP, entropy-based pruning (Zheng et al., NeurIPS 2022, "Pre-activation Distributions Expose Backdoor Neurons").

A backdoor neuron answers clean and triggered images by two separate modes, so that the standardised distribution of its
pre-activations has less entropy than that of others (section 4.2). Of each image the largest pre-activation of the
channel counts. Neurons below mean - u * standard deviation of their layer are pruned; the published code has u = 3.

The paper takes the distribution over the poisoned training set, which is granted to it there. A defender who holds clean
images alone sees one of the two modes; that is the setting here, and what makes this rule weak in it. The published
estimate, a histogram of bins of 0.01, needs tens of thousands of images: here entropy is estimated from spacings
(``scipy.stats.differential_entropy``).
"""

import numpy as np
import torch
from scipy.stats import differential_entropy

from backdoor_gym.envs.defender import Defender
from backdoor_gym.graph.features import standardise

from .pre_activations import largest
from .rule import Rule

#: Clamp of an entropy that is minus infinity, that of values which are all alike.
LEAST_ENTROPY = -20.0


class EP(Rule):
    """Minus the entropy in standard deviations over its layer; neurons without batch normalisation are left."""

    published = 3.0

    def scores(self, defender: Defender) -> np.ndarray:
        scores = np.full(len(defender.neurons), -np.inf)
        found = largest(defender)
        for layer in defender.neurons.layers:
            if layer.normalised:
                scores[layer.neurons] = standardise(-torch.from_numpy(entropy(found[layer.node].double().numpy())))
        return scores


def entropy(values: np.ndarray) -> np.ndarray:
    """Differential entropy of each column after standardisation, in nats, float64 (columns,)."""
    deviations = values.std(axis=0)
    # A constant column has no scale to be standardised with.
    scaled = (values - values.mean(axis=0)) / np.where(deviations > 1e-12, deviations, 1.0)
    with np.errstate(divide="ignore"):
        return np.maximum(differential_entropy(scaled, axis=0), LEAST_ENTROPY)


prune = EP.prune
