"""Embeddings that are kept from step to step: what an episode does not change is embedded once, not once a step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoor_gym.analysis.features import STATIC_FEATURES

from .encoder import GraphActorCritic

_STATIC = len(STATIC_FEATURES)


@dataclass(frozen=True)
class _Known:
    """A graph, and what the network made of it."""

    nodes: Tensor
    edges: Tensor
    edge_links: Tensor
    embedded: Tensor

    def is_of(self, nodes: Tensor, edges: Tensor, edge_links: Tensor) -> bool:
        return (
            torch.equal(self.nodes, nodes)
            and torch.equal(self.edges, edges)
            and torch.equal(self.edge_links, edge_links)
        )


class Remembering:
    """The network without gradients, for batches of observations that follow each other, one of each environment.

    Gives what the network gives, up to rounding. The embedding of a graph is kept for as long as one of the environments
    has that graph and the weights stay as they are.

    Args:
        network: the network; its weights may change in place at any time.
    """

    def __init__(self, network: GraphActorCritic) -> None:
        self.network = network
        self._weights: tuple[tuple[int, int], ...] = ()
        self._known: list[_Known] = []

    @torch.no_grad()
    def __call__(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and values, as ``GraphActorCritic``."""
        weights = tuple((weight.data_ptr(), weight._version) for weight in self.network.parameters())
        known = self._known if weights == self._weights else []
        self._weights, self._known = weights, []
        for nodes, edges, links, size, length in zip(
            *(observation[key] for key in ("nodes", "edges", "edge_links", "num_nodes", "num_edges")), strict=True
        ):
            graph = nodes[: int(size), :_STATIC], edges[: int(length)], links[: int(length)]
            found = next((one for one in (*self._known, *known) if one.is_of(*graph)), None)
            if found is None:
                embedded = self.network.embed_graphs(
                    {
                        "nodes": nodes[None],
                        "edges": graph[1][None],
                        "edge_links": graph[2][None],
                        "num_nodes": size[None],
                        "num_edges": length[None],
                    }
                )
                found = _Known(graph[0].clone(), graph[1].clone(), graph[2].clone(), embedded)
            self._known.append(found)
        embedded = torch.cat([one.embedded for one in self._known])
        return self.network.decide_from(observation, embedded)
