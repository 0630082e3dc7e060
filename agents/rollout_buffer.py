"""Rollouts of graph observations: what does not change of a network is kept once an episode, not once a step."""

from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableDictRolloutBufferSamples

from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.envs.observation import NODE_FEATURES

from .encoder import grown

EDGES = ("edges", "edge_links")
STATIC = len(STATIC_FEATURES)
#: Columns of ``nodes`` that an episode changes; flags take a byte.
CHANGING = {name: index for index, name in enumerate(NODE_FEATURES) if STATIC <= index < NODE_FEATURES.index("real")}
FLAGS = ("pruned", "tried")
#: Keys that are not stored: they are put together again from the others, or stored by sb3-contrib already.
_LEFT_OUT = ("nodes", "action_mask", *EDGES)
_GRAPH = "graph"


class GraphRolloutBuffer(MaskableDictRolloutBuffer):
    """sb3-contrib's buffer of dictionaries, in which steps of one graph share its edges and the static features of its nodes.

    A sample is what ``GraphActorCritic`` takes: whole ``nodes``, edges with one row a graph, cut at the largest one, and
    ``graph``; ``action_mask`` is not among the observations.

    Args:
        buffer_size: steps of each environment.
        observation_space: of ``BackdoorPrune-v0``.
        args: of ``MaskableDictRolloutBuffer``, and so are ``kwargs``.
        kwargs: by name.

    Attributes:
        graphs: the edges, their ends, and the static columns of the nodes of each graph.

    Examples:
        >>> import gymnasium as gym
        >>> from sb3_contrib import MaskablePPO
        >>> from backdoor_gym.agents import GraphPolicy, GraphRolloutBuffer
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> options = {"n_steps": 8, "batch_size": 8, "rollout_buffer_class": GraphRolloutBuffer}
        >>> model = MaskablePPO(GraphPolicy, env, **options).learn(8)
        >>> len(model.rollout_buffer.graphs)
        1
    """

    def __init__(self, buffer_size: int, observation_space: spaces.Dict, *args: Any, **kwargs: Any) -> None:
        self.graphs: list[tuple[np.ndarray, ...]] = []
        nodes = observation_space["nodes"]
        assert isinstance(nodes, spaces.Box)
        self._most = nodes.shape[0]
        stored: dict[str, spaces.Space[Any]] = {
            key: space for key, space in observation_space.spaces.items() if key not in _LEFT_OUT
        }
        for name in CHANGING:
            # the bounds are not read
            stored[name] = spaces.Box(0, 1, (self._most,), np.int8 if name in FLAGS else np.float32)
        stored[_GRAPH] = spaces.Box(0, np.iinfo(np.int64).max, (1,), np.int64)
        super().__init__(buffer_size, spaces.Dict(stored), *args, **kwargs)

    def reset(self) -> None:
        self.graphs = []
        self._current = [-1] * self.n_envs
        super().reset()

    def add(self, obs: dict[str, np.ndarray], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        for index in range(self.n_envs):
            edges, nodes = int(obs["num_edges"][index, 0]), int(obs["num_nodes"][index, 0])
            graph = (*(obs[key][index, :edges] for key in EDGES), obs["nodes"][index, :nodes, :STATIC])
            known = self._current[index]
            if known < 0 or not all(map(np.array_equal, graph, self.graphs[known])):
                self._current[index] = len(self.graphs)
                self.graphs.append(tuple(array.copy() for array in graph))
        stored = {key: value for key, value in obs.items() if key not in _LEFT_OUT}
        stored |= {name: obs["nodes"][:, :, column] for name, column in CHANGING.items()}
        super().add({**stored, _GRAPH: np.array(self._current)[:, None]}, *args, **kwargs)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> MaskableDictRolloutBufferSamples:  # type: ignore[override]
        samples = super()._get_samples(batch_inds, env)
        observations = dict(samples.observations)
        used, which = np.unique(observations[_GRAPH].cpu().numpy().reshape(-1), return_inverse=True)
        graphs = [self.graphs[index] for index in used.astype(int)]
        counts = np.array([[len(edges)] for edges, *_ in graphs])
        for position, key in enumerate(EDGES):
            observations[key] = self.to_torch(np.stack([grown(graph[position], 0, counts.max()) for graph in graphs]))
        observations["num_edges"] = self.to_torch(counts)
        observations[_GRAPH] = self.to_torch(which)
        nodes = np.zeros((len(which), self._most, len(NODE_FEATURES)), dtype=np.float32)
        nodes[:, :, :STATIC] = np.stack([grown(graph[-1], 0, self._most) for graph in graphs])[which]
        for name, column in CHANGING.items():
            nodes[:, :, column] = observations.pop(name).cpu().numpy()
        nodes[:, :, -1] = np.arange(self._most) < observations["num_nodes"].cpu().numpy()
        observations["nodes"] = self.to_torch(nodes)
        return samples._replace(observations=observations)
