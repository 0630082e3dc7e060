"""A ridge regression in place of ONP's network: what a linear score of each neuron's features can do.

It is fitted on the examples of ONP's warm start, and with the same look-ahead it is level with ONP. The weights in
``ridge.json`` are those of ``benchmarks/results/onp_ridge.json``, fitted on ``digits-train/0`` to ``299``;
``python benchmarks/training.py policies --only ridge`` fits them anew.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Self

import numpy as np

from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.envs.observation import NODE_FEATURES

#: The node features that it reads: all but the flags.
FEATURES = (*STATIC_FEATURES, "pull_now", "harm_now", "clean_pull_now")
#: Weight of the squared coefficients.
PENALTY = 10.0
_COLUMNS = [NODE_FEATURES.index(name) for name in FEATURES]


@dataclass(frozen=True)
class Ridge:
    """Scores each unit by a linear function of its features; it never stops of its own.

    A scorer for ``agents.ScoringPolicy``, without which nothing looks ahead:

        policy = ScoringPolicy(Ridge.load(), env, look_ahead=LookAhead())

    Attributes:
        coefficients: of each of ``FEATURES``.
        intercept: what is added.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import Ridge
        >>> observation, _ = gym.make("backdoor_gym:BackdoorPrune-v0").reset(seed=0)
        >>> Ridge.load().scores(observation).argmax().item()
        54
    """

    coefficients: tuple[float, ...]
    intercept: float

    def scores(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of one observation or a batch, float32 (n, N + 1): a score of each unit, and minus infinity for stopping."""
        nodes = observation["nodes"][..., _COLUMNS].astype(np.float64)
        scores = nodes.reshape(-1, *nodes.shape[-2:]) @ np.array(self.coefficients) + self.intercept
        return np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf).astype(np.float32)

    @classmethod
    def load(cls) -> Self:
        """The one that comes with the package."""
        fitted = json.loads((resources.files(__package__) / "ridge.json").read_text(encoding="utf-8"))
        return cls(tuple(fitted["coefficients"]), fitted["intercept"])

    @classmethod
    def fit(cls, states: Iterable[tuple[np.ndarray, np.ndarray]]) -> Self:
        """Fit the logarithm of the preference for each unit, less its mean over the units of the state.

        Args:
            states: nodes, float32 (N, F), and preferences, float32 (N + 1,), of ``agents.warm_start.Example``; where the
                preference is to stop there is nothing to fit.
        """
        from sklearn.linear_model import Ridge as Regression

        features, targets = [], []
        for nodes, preference in states:
            units = np.flatnonzero(preference[:-1])
            if len(units):
                benefit = np.log(preference[units].astype(np.float64))
                features.append(nodes[units][:, _COLUMNS].astype(np.float64))
                targets.append(benefit - benefit.mean())
        fitted = Regression(PENALTY).fit(np.concatenate(features), np.concatenate(targets))
        return cls(tuple(fitted.coef_.tolist()), float(fitted.intercept_))
