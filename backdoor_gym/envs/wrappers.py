"""Other forms of the observation: a ``spaces.Graph`` sample, and a torch-geometric ``Data``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import GraphInstance

if TYPE_CHECKING:
    from torch_geometric.data import Data


class GraphObservation(gym.Wrapper[Any, np.int64, Any, np.int64], gym.utils.RecordConstructorArgs):
    """The observation as a sample of ``spaces.Graph``, without padding.

    What a graph does not hold goes into ``info``: ``action_mask`` int8 (N + 1,) and ``globals`` float32.
    """

    def __init__(self, env: gym.Env[dict[str, np.ndarray], np.int64]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        inner = env.observation_space
        assert isinstance(inner, spaces.Dict)
        self.observation_space = spaces.Graph(
            node_space=_row_space(inner["nodes"]), edge_space=_row_space(inner["edges"])
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[GraphInstance, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return to_graph(observation), self._with_rest(info, observation)

    def step(self, action: np.int64) -> tuple[GraphInstance, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return to_graph(observation), float(reward), terminated, truncated, self._with_rest(info, observation)

    @staticmethod
    def _with_rest(info: dict[str, Any], observation: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {**info, "action_mask": observation["action_mask"], "globals": observation["globals"]}


def to_graph(observation: Mapping[str, np.ndarray]) -> GraphInstance:
    """The observation as a ``GraphInstance`` without padding."""
    nodes, edges = int(observation["num_nodes"][0]), int(observation["num_edges"][0])
    return GraphInstance(
        nodes=observation["nodes"][:nodes],
        edges=observation["edges"][:edges],
        edge_links=observation["edge_links"][:edges],
    )


def to_pyg(observation: Mapping[str, np.ndarray]) -> "Data":
    """The observation as a ``torch_geometric.data.Data`` without padding.

    It has ``x`` float32 (n, 17), ``edge_index`` int64 (2, e), ``edge_attr`` float32 (e, 2), ``globals`` float32 (1, 12),
    and ``action_mask`` bool (n + 1,) with the stop action last.
    """
    import torch
    from torch_geometric.data import Data

    graph = to_graph(observation)
    assert graph.edges is not None
    assert graph.edge_links is not None
    legal = np.append(observation["action_mask"][: int(observation["num_nodes"][0])], observation["action_mask"][-1])
    return Data(
        x=torch.tensor(graph.nodes),
        edge_index=torch.tensor(graph.edge_links.T.copy()),
        edge_attr=torch.tensor(graph.edges),
        globals=torch.tensor(observation["globals"])[None],
        action_mask=torch.tensor(legal.astype(bool)),
    )


def _row_space(space: spaces.Space[Any]) -> spaces.Box:
    """The space of one row of a two-dimensional box."""
    assert isinstance(space, spaces.Box)
    return spaces.Box(space.low[0], space.high[0], dtype=np.float32)
