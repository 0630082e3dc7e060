"""Gymnasium environments in which agents learn to prune the backdoor out of infected neural networks.

Importing this package registers ``BackdoorPrune-v0`` and nothing heavy; the names below are loaded when first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

if TYPE_CHECKING:
    from .benchmarking import benchmark
    from .envs.layers import parallel_env
    from .errors import (
        BackdoorGymError,
        CompactionError,
        DataError,
        ModelFileError,
        TrainingError,
        UnknownNameError,
        UntraceableError,
        WeightsError,
    )
    from .models.catalogue import list_infected, load_infected
    from .models.infected import InfectedModel
    from .models.infecting import infect
    from .repairing import repair
    from .reporting.result import RepairResult

__version__ = "0.1.0"

__all__ = [
    "BackdoorGymError",
    "CompactionError",
    "DataError",
    "Detection",
    "InfectedModel",
    "ModelFileError",
    "RepairResult",
    "TrainingError",
    "UnknownNameError",
    "UntraceableError",
    "WeightsError",
    "benchmark",
    "detect",
    "infect",
    "list_infected",
    "load_infected",
    "parallel_env",
    "repair",
]

_HOMES = {
    "BackdoorGymError": "errors",
    "CompactionError": "errors",
    "DataError": "errors",
    "Detection": "detecting",
    "InfectedModel": "models.infected",
    "ModelFileError": "errors",
    "RepairResult": "reporting.result",
    "TrainingError": "errors",
    "UnknownNameError": "errors",
    "UntraceableError": "errors",
    "WeightsError": "errors",
    "benchmark": "benchmarking",
    "detect": "detecting",
    "infect": "models.infecting",
    "list_infected": "models.catalogue",
    "load_infected": "models.catalogue",
    "parallel_env": "envs.layers",
    "repair": "repairing",
}


def _find_neighbours() -> None:
    """Python that is started in a clone finds this folder first, whatever is installed; agents and baselines lie beside it."""
    here = Path(__file__).parent
    if not (here / "agents").is_dir() and (here.parent / "agents" / "onp.py").is_file():
        __path__.append(str(here.parent))


def _register() -> None:
    if "BackdoorPrune-v0" not in registry:
        register(
            "BackdoorPrune-v0",
            entry_point="backdoor_gym.envs.prune:BackdoorPruneEnv",
            vector_entry_point="backdoor_gym.envs.vector:BackdoorPruneVectorEnv",
        )


def __getattr__(name: str) -> Any:
    if name in ("agents", "baselines"):
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_find_neighbours()
_register()
