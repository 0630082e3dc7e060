"""The network of ONP: embeds the neurons of any network, and gives a logit for each, one for stopping, and a value."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv, global_mean_pool

from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.analysis.neuron_graph import EDGE_FEATURES
from backdoor_gym.envs.observation import GLOBAL_FEATURES, NODE_FEATURES
from backdoor_gym.errors import DataError, UnknownNameError

#: What the network reads of an observation.
OBSERVED = ("nodes", "edges", "edge_links", "num_nodes", "num_edges", "globals")
#: Logit of padding; as low as sb3-contrib's own masks.
PADDING = -1e8
_STATIC = len(STATIC_FEATURES)
_PRUNED, _TRIED = NODE_FEATURES.index("pruned"), NODE_FEATURES.index("tried")


@dataclass(frozen=True)
class EncoderOptions:
    """Shape of the network; the defaults are those of the policy that comes with the package.

    Attributes:
        hidden: size of an embedding.
        hops: rounds.
        heads: attention heads.
        message_passing: whether a round sees the edges; False treats each neuron alone.
        ignore: node or global features that are hidden. The accuracy says which data set it is, not whether there is a
            backdoor; the verdict decides by itself before the first prune.

    Examples:
        >>> from backdoor_gym.agents import EncoderOptions
        >>> EncoderOptions(message_passing=True)
        EncoderOptions(hidden=32, hops=2, heads=2, message_passing=True, ignore=('accuracy', 'verdict'))
    """

    hidden: int = 32
    hops: int = 2
    heads: int = 2
    message_passing: bool = False
    ignore: tuple[str, ...] = ("accuracy", "verdict")

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", tuple(self.ignore))
        for name in self.ignore:
            if name not in (*NODE_FEATURES, *GLOBAL_FEATURES):
                raise UnknownNameError("feature", name, (*NODE_FEATURES, *GLOBAL_FEATURES))
        if min(self.hidden, self.heads, self.hops) < 1 or self.hidden % self.heads:
            raise DataError(f"hidden must be a positive multiple of heads, and hops at least 1: {asdict(self)}")


class GraphActorCritic(nn.Module):
    """Embeds what an episode does not change, then decides from the embeddings and what it does change.

        static node features -> Linear -> hops x [h + GATv2(norm(h), edges); h + MLP(norm(h))] -> embeddings
        embeddings + Linear(flags, globals) -> h + MLP(norm(h)) -> a logit of each neuron
                                                           mean -> a logit of stopping, a value

    GATv2 is that of Brody et al. (ICLR 2022, arXiv:2105.14491); every edge is also passed backwards, marked as such. The
    weights do not depend on the number of neurons, layers or classes; padding and the order of the neurons change
    nothing but the order of the logits.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.agents import EncoderOptions, GraphActorCritic
        >>> from backdoor_gym.agents.encoder import as_tensors
        >>> observation, _ = gym.make("backdoor_gym:BackdoorPrune-v0").reset(seed=0)
        >>> logits, value = GraphActorCritic(EncoderOptions())(as_tensors(observation))
        >>> logits.shape, value.shape
        (torch.Size([1, 601]), torch.Size([1, 1]))
    """

    node_columns: Tensor
    global_columns: Tensor

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.options = options
        hidden, figures = options.hidden, len(GLOBAL_FEATURES)
        self.register_buffer("node_columns", _kept(NODE_FEATURES, options.ignore), persistent=False)
        self.register_buffer("global_columns", _kept(GLOBAL_FEATURES, options.ignore), persistent=False)
        self.embed = nn.Linear(_STATIC, hidden)
        self.rounds = nn.ModuleList(_Round(options) for _ in range(options.hops))
        self.join = nn.Linear(len(NODE_FEATURES) - _STATIC + figures, hidden)
        self.decide = _update(hidden)
        self.leave = nn.LayerNorm(hidden)
        self.neuron = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.stop = nn.Sequential(nn.Linear(hidden + figures, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.value = nn.Sequential(nn.Linear(hidden + figures, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        for head in (self.neuron, self.stop):  # begin without a preference
            last = head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.bias)
            last.weight.data.mul_(0.1)

    @torch.no_grad()
    def scores(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of one observation or a batch of arrays, float32 (n, N + 1), for ``ScoringPolicy``."""
        self.eval()
        return self(as_tensors(observation, self.node_columns.device))[0].cpu().numpy()

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and values of a batch of observations.

        Args:
            observation: tensors of the environment's observation with a leading batch dimension. Where several are of
                one graph, ``edges``, ``edge_links`` and ``num_edges`` may have one row a graph, and ``graph``, int64
                (batch,), says which row is whose. Edges may be cut at the largest ``num_edges``.

        Returns:
            Logits float32 (batch, N + 1), ``PADDING`` for padding, and values float32 (batch, 1). The probabilities of
            the legal neurons sum to 1, so the stop logit alone is the log odds of stopping, for any number of neurons.
        """
        graph = observation.get("graph")
        if graph is None:
            return self.decide_from(observation, self.embed_graphs(observation))
        graph = graph.long().view(-1)
        member = torch.zeros(int(graph.max()) + 1, dtype=torch.long, device=graph.device)
        member[graph] = torch.arange(len(graph), device=graph.device)  # any observation of each graph
        counts = observation["num_nodes"].view(-1)[member].long()
        graphs = {**observation, "nodes": observation["nodes"][member], "num_nodes": counts}
        return self.decide_from(observation, self.embed_graphs(graphs), (torch.cumsum(counts, 0) - counts)[graph])

    def embed_graphs(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Embeddings of the neurons of one observation of each graph, one graph after the other, (neurons, hidden)."""
        nodes, counts = observation["nodes"], observation["num_nodes"].long().view(-1)
        static = nodes[_real(nodes, counts)][:, :_STATIC].float() * self.node_columns[:_STATIC]
        h = self.embed(static)
        links, edges = None, None
        if self.options.message_passing:
            links, edges = _edges(observation, torch.cumsum(counts, 0) - counts)
        for step in self.rounds:
            h = step(h, links, edges)
        return h

    def decide_from(
        self, observation: Mapping[str, Tensor], embedded: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and values, as ``forward`` gives them, from embeddings.

        Args:
            observation: of ``forward``.
            embedded: of ``embed_graphs``.
            first: where the embeddings of each observation begin, int64 (batch,); None where they follow each other.
        """
        flags = observation["nodes"].float()
        batch, most, _ = flags.shape
        device = flags.device
        counts = observation["num_nodes"].long().view(-1)
        real = _real(flags, counts)
        row = torch.repeat_interleave(torch.arange(batch, device=device), counts)
        flags = flags[real]
        if first is not None:  # neuron i of observation b has the embedding of neuron i of its graph
            place = torch.arange(len(row), device=device) - (torch.cumsum(counts, 0) - counts)[row]
            embedded = embedded[first[row] + place]
        figures = observation["globals"].float() * self.global_columns
        changing = torch.cat([flags[:, _STATIC:] * self.node_columns[_STATIC:], figures[row]], dim=1)
        h = embedded + self.join(changing)
        h = self.leave(h + self.decide(h))
        # No maximum: it grows with the number of neurons, and larger networks would look infected.
        pooled = torch.cat([global_mean_pool(h, row, batch), figures], dim=1)
        logits = torch.full((batch, most + 1), PADDING, device=device)
        logits[:, :most][real] = _among_legal(self.neuron(h).squeeze(1), flags, row, batch)
        logits[:, most] = self.stop(pooled).squeeze(1)
        return logits, self.value(pooled)


class _Round(nn.Module):
    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        hidden, heads = options.hidden, options.heads
        self.attend = None
        if options.message_passing:
            self.before = nn.LayerNorm(hidden)
            self.attend = GATv2Conv(
                hidden, hidden // heads, heads, edge_dim=len(EDGE_FEATURES) + 1, add_self_loops=False
            )
        self.update = _update(hidden)

    def forward(self, h: Tensor, links: Tensor | None, edges: Tensor | None) -> Tensor:
        if self.attend is not None:
            h = h + self.attend(self.before(h), links, edges)
        return h + self.update(h)


def _update(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden))


def _real(nodes: Tensor, counts: Tensor) -> Tensor:
    """Which rows are no padding, bool (batch, N)."""
    return torch.arange(nodes.shape[1], device=nodes.device) < counts[:, None]


def _among_legal(scores: Tensor, nodes: Tensor, row: Tensor, batch: int) -> Tensor:
    """Log probability of each neuron among those of its network that are neither pruned nor tried."""
    scores = scores.masked_fill((nodes[:, _PRUNED] + nodes[:, _TRIED]) > 0, PADDING)
    top = torch.full((batch,), PADDING, device=scores.device).scatter_reduce(0, row, scores.detach(), "amax")
    total = torch.zeros(batch, device=scores.device).index_add(0, row, (scores - top[row]).exp())
    return scores - top[row] - total.clamp(min=1e-30).log()[row]


def _edges(observation: Mapping[str, Tensor], first: Tensor) -> tuple[Tensor, Tensor]:
    """All edges of a batch, forwards and backwards, for torch-geometric: links (2, 2e) and features (2e, D + 1)."""
    edges, links = observation["edges"].float(), observation["edge_links"].long()
    real = torch.arange(edges.shape[1], device=edges.device) < observation["num_edges"].long().view(-1, 1)
    link, edge = (links + first[:, None, None])[real].T, edges[real]
    both = [torch.cat([edge, torch.full((len(edge), 1), way, device=edges.device)], 1) for way in (0.0, 1.0)]
    return torch.cat([link, link.flip(0)], dim=1), torch.cat(both)


def _kept(names: Sequence[str], ignored: Sequence[str]) -> Tensor:
    return torch.tensor([float(name not in ignored) for name in names])


def as_tensors(observation: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What the network reads of an observation or a batch of them, with a batch dimension."""
    single = np.ndim(observation["nodes"]) == 2
    arrays = {key: np.asarray(observation[key])[None] if single else np.asarray(observation[key]) for key in OBSERVED}
    return {key: torch.as_tensor(array, device=device) for key, array in arrays.items()}


def grown(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The array with zeros after it, up to a size along an axis."""
    zeros = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), dtype=array.dtype)
    zeros[tuple(map(slice, array.shape))] = array
    return zeros


def encoder_facts(options: EncoderOptions) -> dict[str, Any]:
    """What a file must say of a network to be read again, JSON-able: its options and the features it was made for."""
    return {
        "options": {**asdict(options), "ignore": list(options.ignore)},
        "node_features": list(NODE_FEATURES),
        "global_features": list(GLOBAL_FEATURES),
        "edge_features": list(EDGE_FEATURES),
    }
