"""Rollouts of graph observations: the edges of a network are kept once an episode, not once a step."""

from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableDictRolloutBufferSamples

EDGES = ("edges", "edge_links")
_GRAPH = "graph"


class GraphRolloutBuffer(MaskableDictRolloutBuffer):
    """sb3-contrib's buffer of dictionaries, in which steps of one graph share its edges.

    In a sample the keys of the edges have one row a graph, cut at the largest one, and ``graph`` says which is whose, as
    ``GraphActorCritic`` takes them.

    Args:
        buffer_size: steps of each environment.
        observation_space: of ``BackdoorPrune-v0``.
        args: further arguments of ``MaskableDictRolloutBuffer``.
        kwargs: the same, by name.
    """

    def __init__(self, buffer_size: int, observation_space: spaces.Dict, *args: Any, **kwargs: Any) -> None:
        self.graphs: list[tuple[np.ndarray, ...]] = []
        changing = {key: space for key, space in observation_space.spaces.items() if key not in EDGES}
        most = np.iinfo(np.int64).max
        stored = spaces.Dict({**changing, _GRAPH: spaces.Box(0, most, (1,), np.int64)})
        super().__init__(buffer_size, stored, *args, **kwargs)

    def reset(self) -> None:
        self.graphs = []
        self._current = [-1] * self.n_envs
        super().reset()

    def add(self, obs: dict[str, np.ndarray], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        for index in range(self.n_envs):
            count = int(obs["num_edges"][index, 0])
            graph = tuple(obs[key][index, :count] for key in EDGES)
            known = self._current[index]
            if known < 0 or not all(map(np.array_equal, graph, self.graphs[known])):
                self._current[index] = len(self.graphs)
                self.graphs.append(tuple(array.copy() for array in graph))
        rest = {key: value for key, value in obs.items() if key not in EDGES}
        super().add({**rest, _GRAPH: np.array(self._current)[:, None]}, *args, **kwargs)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> MaskableDictRolloutBufferSamples:  # type: ignore[override]
        samples = super()._get_samples(batch_inds, env)
        observations = dict(samples.observations)
        used, which = np.unique(observations[_GRAPH].cpu().numpy(), return_inverse=True)
        graphs = [self.graphs[index] for index in used.astype(int)]
        counts = np.array([[len(edges)] for edges, _ in graphs])
        for position, key in enumerate(EDGES):
            first = graphs[0][position]
            padded = np.zeros((len(graphs), int(counts.max()), first.shape[1]), dtype=first.dtype)
            for row, graph in zip(padded, graphs, strict=True):
                row[: len(graph[position])] = graph[position]
            observations[key] = self.to_torch(padded)
        observations["num_edges"] = self.to_torch(counts)
        observations[_GRAPH] = self.to_torch(which.reshape(-1))
        return samples._replace(observations=observations)
