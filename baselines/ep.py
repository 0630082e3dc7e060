"""EP, entropy-based pruning (Zheng et al., NeurIPS 2022, "Pre-activation Distributions Expose Backdoor Neurons").

A backdoor neuron answers clean and triggered images by two modes, so the standardised distribution of its
pre-activations has less entropy than that of others (section 4.2). Of each image the largest pre-activation of the
channel counts. Neurons below mean - u * standard deviation of their layer are pruned; the published code has u = 3.

The paper takes the distribution over the poisoned training set. A defender holds clean images alone and sees one of the
two modes, which makes the rule weak here. The published histogram has bins of 0.01 for 50,000 images; for n images they
are (50,000 / n)^(1/3) times as wide (Freedman and Diaconis, 1981).

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import ep
    >>> model = load_infected("digits-badnets")
    >>> repaired = ep.prune(model.network, (model.clean.images, model.clean.labels))
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    1.0
"""

import numpy as np
import torch

from backdoor_gym.analysis.features import standardise
from backdoor_gym.session.defender import Defender

from .pre_activations import largest
from .rule import Rule

BIN, BIN_IMAGES = 0.01, 50_000


class EP(Rule):
    """Minus the entropy in standard deviations over its layer; neurons without batch normalisation are left.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import EP
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = EP(env).predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer4.1.conv1[18]'
    """

    published = 3.0
    scored = "neurons with batch normalisation"

    def scores(self, defender: Defender) -> np.ndarray:
        scores = np.full(len(defender.neurons), -np.inf)
        read = largest(defender)
        for layer in defender.neurons.layers:
            if layer.normalised:
                scores[layer.neurons] = standardise(-torch.from_numpy(entropy(read[layer.node].double().numpy())))
        return scores


def bin_width(images: int) -> float:
    """Of the histogram of so many images, in standard deviations."""
    return BIN * (BIN_IMAGES / images) ** (1 / 3)


def entropy(values: np.ndarray) -> np.ndarray:
    """Entropy of the histogram of each column after standardisation, in nats, float64 (columns,); 0 of a constant one."""
    deviations = values.std(axis=0)
    scaled = (values - values.mean(axis=0)) / np.where(deviations > 1e-12, deviations, np.inf)
    bins = np.floor(scaled / bin_width(len(values))).astype(np.int64)
    shares = [np.unique(column, return_counts=True)[1] / len(values) for column in bins.T]
    return np.array([-(share * np.log(share)).sum() for share in shares])


prune = EP.prune
