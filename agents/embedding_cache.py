"""Embeddings that are kept from step to step: what an episode does not change is embedded once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from backdoor_gym.analysis.features import STATIC_FEATURES

from .encoder import GraphActorCritic

#: Static features of the nodes, edges and their ends, without padding.
Graph = tuple[Tensor, Tensor, Tensor]


class EmbeddingCache:
    """The network without gradients, for batches of observations that follow each other, one of each environment.

    It gives what the network gives, up to rounding. An embedding is kept while an environment has its graph and the
    weights stay as they are.

    Args:
        network: the network; its weights may change in place at any time.
    """

    def __init__(self, network: GraphActorCritic) -> None:
        self.network = network
        self._weights: list[tuple[int, int]] = []
        self._known: list[tuple[Graph, Tensor]] = []

    @torch.no_grad()
    def __call__(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and values, as ``GraphActorCritic``."""
        weights = [(weight.data_ptr(), weight._version) for weight in self.network.parameters()]
        before = self._known if weights == self._weights else []
        self._weights, self._known = weights, []
        for index, (nodes, edges) in enumerate(zip(observation["num_nodes"], observation["num_edges"], strict=True)):
            row = {key: value[index : index + 1] for key, value in observation.items()}
            row |= {key: row[key][:, : int(edges)] for key in ("edges", "edge_links")}
            graph = row["nodes"][0, : int(nodes), : len(STATIC_FEATURES)], row["edges"][0], row["edge_links"][0]
            known = (entry for entry in (*self._known, *before) if all(map(torch.equal, entry[0], graph)))
            self._known.append(next(known, None) or self._embed(graph, row))
        return self.network.decide_from(observation, torch.cat([embedded for _, embedded in self._known]))

    def _embed(self, graph: Graph, observation: Mapping[str, Tensor]) -> tuple[Graph, Tensor]:
        static, edges, links = (part.clone() for part in graph)
        return (static, edges, links), self.network.embed_graphs(observation)
