"""Published pruning rules as policies for ``BackdoorPrune-v0``, each with Stable-Baselines3's ``predict``.

Each module of a rule has a function ``prune`` that does without an environment.
"""

from . import anp, bnp, clp, ep, fine_pruning, magnitude, rnp
from .anp import ANP
from .bnp import BNP
from .clp import CLP
from .ep import EP
from .fine_pruning import FinePruning
from .greedy import GreedyACC
from .magnitude import Magnitude
from .policy import Policy
from .random_policy import RandomPolicy
from .rnp import RNP
from .rule import Rule

__all__ = [
    "ANP",
    "BNP",
    "CLP",
    "EP",
    "RNP",
    "FinePruning",
    "GreedyACC",
    "Magnitude",
    "Policy",
    "RandomPolicy",
    "Rule",
    "anp",
    "bnp",
    "clp",
    "ep",
    "fine_pruning",
    "magnitude",
    "rnp",
]
