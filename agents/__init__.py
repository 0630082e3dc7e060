"""Agents that learn to prune: ONP, its graph network, and the network as a Stable-Baselines3 policy."""

from .encoder import EncoderOptions, GraphActorCritic
from .graph_policy import GraphPolicy
from .look_ahead import LookAhead
from .onp import ONP
from .rollout_buffer import GraphRolloutBuffer
from .scoring import ScoringPolicy

__all__ = [
    "ONP",
    "EncoderOptions",
    "GraphActorCritic",
    "GraphPolicy",
    "GraphRolloutBuffer",
    "LookAhead",
    "ScoringPolicy",
]
