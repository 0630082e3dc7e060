"""Published pruning rules as policies for ``BackdoorPrune-v0``, each with a function ``prune`` that needs no environment."""

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
from .ridge import Ridge
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
    "Ridge",
    "Rule",
    "anp",
    "bnp",
    "clp",
    "ep",
    "fine_pruning",
    "magnitude",
    "rnp",
]
