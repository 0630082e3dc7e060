"""Where the general policy learns: many infected models of ours, whose triggers we know."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor

from backdoor_gym.errors import DataError
from backdoor_gym.models.catalogue import resolve
from backdoor_gym.session.generator import InfectedGenerator
from backdoor_gym.session.prepared_model import Preparation

from .vec_env import ThreadedVecEnv

ENVIRONMENT = "backdoor_gym:BackdoorPrune-v0"
#: Accuracy budgets met in training; the observation tells which one it is.
BUDGETS = (0.01, 0.02, 0.05)
MAX_STEPS = 100


def school(infected: Sequence[str], envs: int = 12, seed: int | None = None, **options: Any) -> ThreadedVecEnv:
    """A vector environment that divides models among its sub-environments, so that none is prepared twice.

    Args:
        infected: names and patterns.
        envs: how many sub-environments; they take the ``BUDGETS`` in turn.
        seed: of the order of the models.
        options: of the environments; ``accuracy_budget`` replaces the ``BUDGETS``.

    Raises:
        DataError: fewer models than sub-environments.
    """
    names = names_of(infected)
    if len(names) < envs:
        raise DataError(f"{len(names)} models cannot be divided among {envs} sub-environments; lower envs")
    options = {"max_steps": MAX_STEPS, "max_units": InfectedGenerator(names, Preparation()).max_units(), **options}
    vector = ThreadedVecEnv(
        [
            _maker(infected=names[index::envs], **{"accuracy_budget": BUDGETS[index % len(BUDGETS)], **options})
            for index in range(envs)
        ]
    )
    vector.seed(seed)
    return vector


def names_of(patterns: Sequence[str]) -> list[str]:
    """The names that some names and patterns stand for, in order."""
    return [name for pattern in patterns for name in resolve(pattern)]


def _maker(**options: Any) -> Callable[[], gym.Env[Any, Any]]:
    return lambda: Monitor(gym.make(ENVIRONMENT, disable_env_checker=True, **options))
