"""Where the general policy learns: many infected models of ours, whose triggers we know."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from backdoor_gym.errors import DataError
from backdoor_gym.models.catalogue import resolve
from backdoor_gym.session.generator import InfectedGenerator
from backdoor_gym.session.prepared_model import VictimOptions

from .vec_env import ThreadedVecEnv

ENVIRONMENT = "BackdoorPrune-v0"
#: Accuracy budgets met in training; the observation tells which one it is.
BUDGETS = (0.01, 0.02, 0.05)
MAX_STEPS = 100


def school(
    infected: Sequence[str], envs: int = 12, processes: bool = False, seed: int | None = None, **options: Any
) -> VecEnv:
    """A vector environment that divides models among its sub-environments, each with one of the ``BUDGETS``.

    No two sub-environments prepare the same model.

    Args:
        infected: names and patterns.
        envs: how many sub-environments.
        processes: whether each gets a process of its own.
        seed: of the order of the models.
        options: of the environments; ``accuracy_budget`` replaces the ``BUDGETS``.

    Raises:
        DataError: fewer models than sub-environments.
    """
    names = [name for pattern in infected for name in resolve(pattern)]
    if len(names) < envs:
        raise DataError(f"{len(names)} models cannot be divided among {envs} sub-environments; lower envs")
    shared = {"max_steps": MAX_STEPS, "max_units": InfectedGenerator(names, VictimOptions()).max_units(), **options}
    makers = [
        _maker({"accuracy_budget": BUDGETS[index % len(BUDGETS)], **shared}, names[index::envs])
        for index in range(envs)
    ]
    vector: VecEnv = SubprocVecEnv(makers) if processes else ThreadedVecEnv(makers)
    vector.seed(seed)
    return vector


def _maker(options: dict[str, Any], names: list[str]) -> Callable[[], gym.Env[Any, Any]]:
    def make() -> gym.Env[Any, Any]:
        import backdoor_gym  # registers the environment, also in a process of its own

        gym.register_envs(backdoor_gym)
        return Monitor(gym.make(ENVIRONMENT, infected=names, disable_env_checker=True, **options))

    return make
