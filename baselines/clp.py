"""CLP, channel Lipschitzness based pruning (Zheng et al., ECCV 2022, arXiv:2208.03111).

CLP prunes, in each layer, the channels whose UCLC lies above mean + u * standard deviation of the layer (section 4.2;
u = 3 on ResNet-18). It needs no data and no training. ``backdoor_gym.analysis.uclc`` defines the bound, also where the
paper is silent: residual sums, linear layers, layers without batch normalisation.

Example:
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
import torch
from torch import Tensor, nn

from backdoor_gym.analysis.features import STATIC_FEATURES, standardise
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.errors import DataError
from backdoor_gym.policies.contract import Observation
from backdoor_gym.policies.thresholds import AUTO, Threshold, check_threshold
from backdoor_gym.session.defender import Defender

from .rule import ACCURACY_BUDGET, Rule, checked_pair, prune_by

U = 3.0
_UCLC = STATIC_FEATURES.index("uclc")


class CLP(Rule):
    """(UCLC - layer mean) / unbiased standard deviation: a node feature, so CLP acts on the observation alone.

    Args:
        u: threshold in standard deviations, "auto" or "budget", see ``Rule``.
        env: the environment, needed for "auto", which asks it for the clean accuracy at each threshold.
        accuracy_budget: clean accuracy that "auto" may lose.

    Raises:
        DataError: an unusable threshold, or "auto" without an environment.

    Example:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import CLP
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> action, _ = CLP().predict(observation)
        >>> env.step(action)[-1]["neuron"]
        'layer3.1.conv2[11]'
    """

    published = U
    symbol = "u"

    def __init__(self, u: Threshold = U, env: Any = None, accuracy_budget: float = ACCURACY_BUDGET) -> None:
        check_threshold(u)
        if isinstance(u, str) and u == AUTO and env is None:
            raise DataError('CLP(u="auto") needs the environment it acts in: CLP("auto", env)')
        super().__init__(env, u, accuracy_budget)

    def scores(self, defender: Defender) -> np.ndarray:
        bounds = uclc(defender.neurons.graph, defender.neurons)
        return np.concatenate([standardise(layer).cpu().numpy() for layer in bounds])

    def scores_in(self, observation: Observation, environment: int) -> np.ndarray:
        return observation["nodes"][: int(observation["num_nodes"][0]), _UCLC].astype(np.float64)

    @classmethod
    def prune(  # type: ignore[override]  # no clean images are needed
        cls,
        network: nn.Module,
        u: Threshold = U,
        inplace: bool = False,
        clean: tuple[Tensor, Tensor] | None = None,
        accuracy_budget: float = ACCURACY_BUDGET,
    ) -> nn.Module:
        """``Rule.prune`` with ``u`` for the threshold; ``clean`` is needed for "auto" alone."""
        if isinstance(u, tuple | list | Tensor):
            raise DataError(
                "the second argument of CLP is u, its threshold: it needs no images, and takes them as clean=(images, labels)"
            )
        check_threshold(u)
        rule = cls(accuracy_budget=accuracy_budget)
        rule.threshold = u
        traced_with = None if clean is None else checked_pair(clean)[0]
        if clean is None:
            if u == AUTO:
                raise DataError('u="auto" needs clean images: clean=(images, labels)')
            clean = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)  # a number looks at none
        return prune_by(rule, network, clean, inplace, traced_with)


prune = CLP.prune
