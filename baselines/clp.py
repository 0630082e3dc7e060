"""CLP, channel Lipschitzness based pruning (Zheng et al., ECCV 2022, arXiv:2208.03111).

CLP prunes, in each layer, the channels whose UCLC lies above mean + u * standard deviation of the layer (section 4.2;
u = 3 on ResNet-18). It needs no data and no training. ``backdoor_gym.analysis.uclc`` defines the bound, also where the
paper is silent: residual sums, linear layers, layers without batch normalisation.

Examples:
    >>> from dataclasses import replace
    >>> from backdoor_gym import load_infected
    >>> from backdoor_gym.baselines import clp
    >>> model = load_infected("digits-badnets")
    >>> repaired = clp.prune(model.network)
    >>> round(replace(model, network=repaired).evaluate().asr, 2)
    1.0
"""

from typing import Any

import numpy as np

from backdoor_gym.analysis.features import STATIC_FEATURES, standardise
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.policies.contract import Observation
from backdoor_gym.policies.thresholds import Threshold
from backdoor_gym.session.defender import Defender

from .rule import ACCURACY_BUDGET, Rule

_UCLC = STATIC_FEATURES.index("uclc")


class CLP(Rule):
    """(UCLC - layer mean) / unbiased standard deviation: a node feature, so CLP acts on the observation alone.

    Args:
        env: of ``Rule``; None will do where ``u`` is a number.
        u: ``threshold`` of ``Rule``, in standard deviations.
        accuracy_budget: of ``Rule``.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import CLP
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = CLP(env).predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer3.1.conv2[11]'
    """

    published = 3.0
    symbol = "u"
    reads_images = False

    def __init__(self, env: Any, u: Threshold | None = None, accuracy_budget: float = ACCURACY_BUDGET) -> None:
        super().__init__(env, u, accuracy_budget)

    def scores(self, defender: Defender) -> np.ndarray:
        bounds = uclc(defender.neurons.graph, defender.neurons)
        return np.concatenate([standardise(layer).cpu().numpy() for layer in bounds])

    def scores_in(self, observation: Observation, environment: int) -> np.ndarray:
        return observation["nodes"][: int(observation["num_nodes"][0]), _UCLC].astype(np.float64)


prune = CLP.prune
