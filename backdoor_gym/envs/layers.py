"""One agent a layer: the PettingZoo form of BackdoorPrune."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils import parallel_to_aec

from ..arguments import check_kind
from ..errors import DataError, check_name
from ..session.defender import Defender
from ..session.generator import Infected
from ..wording import shown
from .observation import GLOBAL_FEATURES
from .prune import _OVER, DEFAULT_INFECTED, BackdoorPruneEnv
from .reward import Reward

Observation = dict[str, Any]


@dataclass(frozen=True)
class Layers:
    """The layers of a network that own units, in network order.

    Attributes:
        units: of each layer, by its name.
        links: of each layer the strengths, float32 (e, 1), and the ends, int64 (e, 2), of the similarity links inside it,
            with its units numbered from 0.
    """

    units: dict[str, np.ndarray]
    links: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, owners: Mapping[str, np.ndarray], edges: np.ndarray, edge_links: np.ndarray) -> Self:
        """From ``owners``, and the edges of the neuron graph."""
        return cls(dict(owners), {name: _links_inside(edges, edge_links, units) for name, units in owners.items()})

    def observation(self, name: str, whole: Mapping[str, np.ndarray], stopped: bool = False) -> Observation:
        """What the agent of a layer sees of an observation of the whole network, as in the PettingZoo environment."""
        units, (edges, links) = self.units[name], self.links[name]
        legal = whole["action_mask"][units].astype(bool) & (not stopped)
        return {
            "observation": {
                "nodes": whole["nodes"][units],
                "edges": _at_least_one(edges),
                "edge_links": _at_least_one(links),
                "num_edges": np.array([len(edges)], dtype=np.int64),
                "globals": whole["globals"].copy(),
            },
            "action_mask": np.append(legal, True).astype(np.int8),
        }


def owners(defender: Defender) -> dict[str, np.ndarray]:
    """Units of each layer, int64 (n,): a group belongs to the first layer that it has a neuron in."""
    neurons = defender.neurons
    layer_of = neurons.layer_index[[unit[0] for unit in defender.units]]
    of_layer = {layer.name: np.flatnonzero(layer_of == index) for index, layer in enumerate(neurons.layers)}
    return {name: units for name, units in of_layer.items() if len(units)}


class BackdoorPruneLayersEnv(ParallelEnv[str, Observation, int], EzPickle):
    """Prune the backdoor out of an infected network, one agent a layer, all at once.

    ## Description

    ONP's reading of pruning (2024): each layer of the network is a graph of its own, and has an agent that prunes its
    neurons. The network, what a neuron is, the accuracy budget and its guard, and the rewards are those of
    ``BackdoorPrune-v0`` (``backdoor_gym.envs.prune``).

    ## Agents

    ``possible_agents`` are the names of the layers of neurons, in network order. With ``residual="group"`` a group of coupled
    neurons belongs to the first layer that it has a neuron in, so that each is pruned by one agent, and a layer that owns none
    has no agent.

    ## Actions

    ``Discrete(n + 1)`` for a layer of n neurons: prune that neuron, or stop (the last). In a round the agents' prunes are
    made one after the other in network order, each under the guard. An illegal action (pruned, or tried and undone) changes
    nothing and costs the step penalty. An agent that has said stop keeps stopping: nothing else is legal for it, and nothing
    else that it says is heard.

    ## Observations

    For each agent ``{"observation": Dict, "action_mask": int8 (n + 1,)}``. The inner one has ``nodes`` float32 (n, 17) as in the
    single-agent environment, ``edges`` float32 (max(1, e), 1) and ``edge_links`` int64 (max(1, e), 2), the similarity links
    inside the layer (cosine of the vectors of connection strengths) with neurons numbered within the layer, ``num_edges``
    int64 (1,) = e, and ``globals`` float32 (12,), the same for all. ``state()`` is all of them in one float32 vector.

    ## Rewards

    Shared: every agent gets the sum of what the prunes of the round earned and cost.

    ## Starting state

    The whole network, nothing pruned, all agents acting.

    ## Episode end

    All agents end together. *Terminated*: all have stopped, ``max_failures`` prunes were undone, or no neuron is left.
    *Truncated*: ``max_steps`` rounds.

    ## Infos

    Of each agent ``neuron`` (name of what it pruned in this round, "" if nothing), ``undone``, and ``stopped``; and of the network
    what the single-agent environment tells.

    ## Arguments

    Args:
        infected: one name, file or ``InfectedModel``; the agents depend on it.
        reward: "acc", "oracle" or a callable.
        accuracy_budget: tolerated loss of clean accuracy, or None.
        max_steps: rounds until truncation, or None for the number of neurons of the widest layer.
        render_mode: "human", "rgb_array", "ansi" or None.
        **options: the others of ``BackdoorPruneEnv``.

    Raises:
        DataError: several models, or an unusable option.

    ## Version history

    - v0: first version.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by pettingzoo)
        "name": "backdoor_prune_layers_v0",
        "render_modes": ["human", "rgb_array", "ansi"],
        "render_fps": 4,
        "is_parallelizable": True,
    }

    def __init__(
        self,
        infected: Infected = DEFAULT_INFECTED,
        reward: str | Reward = "acc",
        accuracy_budget: float | None = 0.02,
        max_steps: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        EzPickle.__init__(self, infected, reward, accuracy_budget, max_steps, render_mode, **options)
        self.single = BackdoorPruneEnv(
            infected,
            reward=reward,
            accuracy_budget=accuracy_budget,
            max_steps=max_steps,
            render_mode=render_mode,
            **options,
        )
        if len(self.single.generator) != 1:
            raise DataError(
                f"one agent a layer needs one network, not {len(self.single.generator)}: its layers are the agents"
            )
        self.render_mode = render_mode
        prepared = self.single.generator.draw(np.random.default_rng(0))  # the only one
        self._layers = Layers.of(owners(prepared.defender), prepared.graph.edges, prepared.graph.edge_links)
        #: Units of each agent.
        self.units = self._layers.units
        self.possible_agents = list(self.units)
        self.agents: list[str] = []
        self.max_steps = max_steps or max(len(units) for units in self.units.values())
        self._stopped: set[str] = set()
        self._rounds = 0

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and where the episode is: a copy or pickle in mid-episode goes on where it was."""
        under_way = {name: getattr(self, name) for name in ("single", "agents", "_stopped", "_rounds")}
        return {**EzPickle.__getstate__(self), "under_way": under_way}

    def __setstate__(self, state: dict[str, Any]) -> None:
        EzPickle.__setstate__(self, state)
        self.__dict__.update(state["under_way"])

    def observation_space(self, agent: str) -> spaces.Dict:
        """Of one agent."""
        check_name("agent", agent, self.units)
        return self._observation_space(agent)

    def action_space(self, agent: str) -> spaces.Discrete:
        """Of one agent: its neurons in network order, then stop."""
        check_name("agent", agent, self.units)
        return self._action_space(agent)

    @functools.cache  # noqa: B019 (PettingZoo asks for the same object each time)
    def _observation_space(self, agent: str) -> spaces.Dict:
        count, (edges, _) = len(self.units[agent]), self._layers.links[agent]
        whole = self.single.observation_space
        assert isinstance(whole, spaces.Dict)
        nodes, figures = whole["nodes"], whole["globals"]
        assert isinstance(nodes, spaces.Box)
        assert isinstance(figures, spaces.Box)
        rows = max(1, len(edges))
        return spaces.Dict(
            {
                "observation": spaces.Dict(
                    {
                        "nodes": spaces.Box(nodes.low[0, 0], nodes.high[0, 0], (count, nodes.shape[1]), np.float32),
                        "edges": spaces.Box(0.0, 1.0, (rows, 1), np.float32),
                        "edge_links": spaces.Box(0, max(0, count - 1), (rows, 2), np.int64),
                        "num_edges": spaces.Box(0, rows, (1,), np.int64),
                        "globals": spaces.Box(figures.low, figures.high, dtype=np.float32),
                    }
                ),
                "action_mask": spaces.Box(0, 1, (count + 1,), np.int8),
            }
        )

    @functools.cache  # noqa: B019
    def _action_space(self, agent: str) -> spaces.Discrete:
        return spaces.Discrete(len(self.units[agent]) + 1)

    @property
    def state_space(self) -> spaces.Box:
        """Of ``state()``."""
        whole = self.single.observation_space
        assert isinstance(whole, spaces.Dict)
        nodes = whole["nodes"].shape
        assert nodes is not None
        return spaces.Box(-np.inf, np.inf, (nodes[0] * nodes[1] + len(GLOBAL_FEATURES),), np.float32)

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        """Begin an episode with all agents; there is one network, and so no option that is heeded."""
        check_kind("options", options, Mapping, "a dict", may_be_none=True)
        self.single.reset(seed=seed)
        self.agents = list(self.possible_agents)
        self._stopped, self._rounds = set(), 0
        return self._observations(), self._infos({}, set())

    def step(
        self, actions: dict[str, int]
    ) -> tuple[dict[str, Observation], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One round.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun, or it is over and there are actions.
            UnknownNameError: an action of no agent.
            DataError: an agent without an action, or an action that its space does not have.
        """
        self._check_actions(actions)
        if not self.agents:
            return {}, {}, {}, {}, {}
        session = self.single.session
        self._rounds += 1
        reward = 0.0
        pruned: dict[str, int] = {}
        undone: set[str] = set()
        for agent in self.agents:
            action = int(actions[agent])
            if agent in self._stopped or session.exhausted:
                continue
            if action == len(self.units[agent]):
                self._stopped.add(agent)
                continue
            earned, unit, was_undone = self.single.prune_unit(int(self.units[agent][action]))
            reward += earned
            if unit is not None:
                pruned[agent] = unit
            if was_undone:
                undone.add(agent)
        terminated = len(self._stopped) == len(self.possible_agents) or session.exhausted
        truncated = not terminated and self._rounds >= self.max_steps
        acting = self.agents
        result = (
            self._observations(),
            dict.fromkeys(acting, reward),
            dict.fromkeys(acting, terminated),
            dict.fromkeys(acting, truncated),
            self._infos(pruned, undone),
        )
        if terminated or truncated:
            self.agents = []
        if self.render_mode == "human":
            self.render()
        return result

    def _check_actions(self, actions: Any) -> None:
        _ = self.single.session  # there is none before the first reset
        check_kind("actions", actions, Mapping, "a dict with the action of each agent")
        if actions and not self.agents:
            raise gym.error.ResetNeeded(_OVER)
        for agent in actions:
            check_name("agent", agent, self.units)
        for agent in self.agents:
            action = actions.get(agent)
            if isinstance(action, bool) or not self.action_space(agent).contains(action):
                raise DataError(f"{agent} needs an action from 0 to {len(self.units[agent])}, not {shown(action)}")

    def state(self) -> np.ndarray:
        """Node features of the whole network and the global figures, float32, in one vector."""
        whole = self.single.observe()
        return np.concatenate([whole["nodes"].ravel(), whole["globals"]])

    def render(self) -> Any:
        """As the single-agent environment does."""
        return self.single.render()

    def close(self) -> None:
        """Close the window and give back memory."""
        self.single.close()

    def _observations(self) -> dict[str, Observation]:
        whole = self.single.observe()
        whole["globals"][GLOBAL_FEATURES.index("steps_left")] = max(0.0, 1 - self._rounds / self.max_steps)
        return {agent: self._layers.observation(agent, whole, agent in self._stopped) for agent in self.agents}

    def _infos(self, pruned: dict[str, int], undone: set[str]) -> dict[str, dict[str, Any]]:
        shared = {key: value for key, value in self.single.info().items() if key not in ("neuron", "undone")}
        names = self.single.session.prepared.unit_names
        return {
            agent: {
                **shared,
                "neuron": names[pruned[agent]] if agent in pruned else "",
                "undone": agent in undone,
                "stopped": agent in self._stopped,
            }
            for agent in self.agents
        }


def parallel_env(**options: Any) -> BackdoorPruneLayersEnv:
    """A ``BackdoorPruneLayersEnv``, under the name that PettingZoo gives such functions.

    Examples:
        >>> from backdoor_gym import parallel_env
        >>> env = parallel_env()
        >>> observations, infos = env.reset(seed=0)
        >>> len(env.agents), env.agents[:2], env.action_space("conv1")
        (20, ['conv1', 'layer1.0.conv1'], Discrete(9))
    """
    return BackdoorPruneLayersEnv(**options)


def env(**options: Any) -> AECEnv[str, Observation, int]:
    """The same with the agents acting one after the other (PettingZoo's AEC); a round is played when all have acted."""
    return parallel_to_aec(BackdoorPruneLayersEnv(**options))


def _links_inside(edges: np.ndarray, edge_links: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths, float32 (e, 1), and ends, int64 (e, 2), of the similarity links between some units, numbered among them."""
    inside = (edges[:, 1] == 1) & np.isin(edge_links, units).all(axis=1)
    return edges[inside, :1].astype(np.float32), np.searchsorted(units, edge_links[inside]).astype(np.int64)


def _at_least_one(rows: np.ndarray) -> np.ndarray:
    """A copy with a row of zeros where there is none: spaces have no empty arrays."""
    return rows.copy() if len(rows) else np.zeros((1, rows.shape[1]), dtype=rows.dtype)
