"""Published pruning rules as policies for ``BackdoorPrune-v0``, each with Stable-Baselines3's ``predict``."""

from . import clp
from .clp import CLP
from .policy import Policy
from .random_policy import RandomPolicy

__all__ = ["CLP", "Policy", "RandomPolicy", "clp"]
