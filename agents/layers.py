"""ONP with one agent a layer: all agents share one graph policy, and each sees the graph of its own layer alone.

The reading of pruning as one graph a layer is that of ONP (2024). Sharing the weights among agents is parameter sharing
(Gupta et al., "Cooperative multi-agent control using deep reinforcement learning", 2017): to PPO every agent is one more
environment.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv
from stable_baselines3.common.vec_env import VecEnv

from backdoor_gym.baselines.policy import Policy, ask, check_env, stop_action
from backdoor_gym.envs.layers import BackdoorPruneLayersEnv, Layers, owners
from backdoor_gym.envs.observation import ObservationBuilder
from backdoor_gym.errors import DataError
from backdoor_gym.session.generator import InfectedGenerator
from backdoor_gym.session.prefetch import core_threads
from backdoor_gym.session.prepared_model import VictimOptions

from .encoder import EncoderOptions
from .onp import ONP
from .warm_start import Example

#: No agent sees what the others cost in accuracy but through the figures that all share. How many steps are left is not the
#: same thing in rounds and in single prunes.
LAYER_ENCODER = EncoderOptions(ignore=("accuracy", "steps_left"))
#: Preference for stopping beside that for the best neuron of the whole network, which is 1: a layer whose best neuron is
#: liked less says stop.
STOP = 0.1
#: Fact of a saved policy that agents of layers share.
PER_LAYER = "per_layer"
_SIMILAR = VictimOptions().similar


class LayerPolicy(Policy):
    """The agents of all layers, as one policy in ``BackdoorPrune-v0`` or as actions for the PettingZoo environment.

    In the single-agent environment a round of the agents is played as single steps: what they want to prune in network
    order. It stops when all of them have.

    Args:
        onp: the policy that they share, trained in a ``LayersVecEnv``.
        env: the environment it is to act in.
    """

    def __init__(self, onp: ONP, env: Any = None) -> None:
        self.onp = onp
        self.env = env
        self._layers: dict[int, Layers] = {}
        self._stopped: dict[int, set[str]] = {}
        self._wanted: dict[int, list[int]] = {}

    def set_env(self, env: Any) -> None:
        super().set_env(env)
        for environment in list(self._layers):
            self.begin(environment)

    def begin(self, environment: int) -> None:
        for memory in (self._layers, self._stopped, self._wanted):
            memory.pop(environment, None)

    def act(self, observation: Mapping[str, np.ndarray], environment: int) -> int:
        if environment not in self._layers:
            check_env(self, self.env, environment, observation)
            self._layers[environment] = Layers.of(
                ask(self.env, environment, "consult", owners), observation["edges"], observation["edge_links"]
            )
            self._stopped[environment], self._wanted[environment] = set(), []
        layers, stopped = self._layers[environment], self._stopped[environment]
        if not self._wanted[environment]:
            acting = [name for name in layers.units if name not in stopped]
            actions = self.actions({name: layers.observation(name, observation) for name in acting})
            stopped.update(name for name in acting if actions[name] == len(layers.units[name]))
            self._wanted[environment] = [
                int(layers.units[name][actions[name]]) for name in acting if name not in stopped
            ]
        return self._wanted[environment].pop(0) if self._wanted[environment] else stop_action(observation)

    def actions(self, observations: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """An action for each agent that observes something, in the actions of its own space."""
        if not observations:
            return {}
        most = max(len(seen["action_mask"]) for seen in observations.values()) - 1
        graphs = [as_graph(seen, most) for seen in observations.values()]
        chosen, _ = self.onp.predict(
            {key: np.stack([graph[key] for graph in graphs]) for key in graphs[0]}, deterministic=True
        )
        return {
            agent: min(int(action), len(seen["action_mask"]) - 1)
            for (agent, seen), action in zip(observations.items(), chosen, strict=True)
        }


def as_graph(seen: Mapping[str, Any], most: int) -> dict[str, np.ndarray]:
    """What one agent observes, in the form of the single-agent environment of networks of up to ``most`` neurons."""
    own, count, edges = seen["observation"], len(seen["action_mask"]) - 1, int(seen["observation"]["num_edges"][0])
    room = _SIMILAR * most
    nodes = np.zeros((most, own["nodes"].shape[1]), dtype=np.float32)
    nodes[:count] = own["nodes"]
    strengths, links = np.zeros((room, 2), dtype=np.float32), np.zeros((room, 2), dtype=np.int64)
    strengths[:edges, 0], strengths[:edges, 1] = own["edges"][:edges, 0], 1
    links[:edges] = own["edge_links"][:edges]
    mask = np.zeros(most + 1, dtype=np.int8)
    mask[:count], mask[-1] = seen["action_mask"][:-1], 1
    return {
        "nodes": nodes,
        "edges": strengths,
        "edge_links": links,
        "num_nodes": np.array([count], dtype=np.int64),
        "num_edges": np.array([edges], dtype=np.int64),
        "action_mask": mask,
        "globals": own["globals"],
    }


class PaddedLayersEnv(ParallelEnv[str, dict[str, np.ndarray], int]):
    """``BackdoorPruneLayersEnv`` with one space for all agents, and another network in each episode.

    The agents are called ``layer_0``, ``layer_1``, ... in network order; those that a network does not have are not there in
    its episodes. Observations are those of ``BackdoorPrune-v0``, padded; the last action is stop.

    Args:
        infected: names and files; each episode draws one.
        most: neurons of a layer at most, and
        layers: layers of a network at most, as ``largest`` finds them.
        **options: of ``BackdoorPruneLayersEnv``, but ``residual`` and ``similar``.
    """

    metadata: dict[str, Any] = {"name": "backdoor_prune_padded_layers_v0", "is_parallelizable": True}  # noqa: RUF012
    render_mode = None

    def __init__(self, infected: Sequence[str], most: int, layers: int, **options: Any) -> None:
        self.names, self.most, self._options = list(infected), most, options
        self.possible_agents = [f"layer_{index}" for index in range(layers)]
        self.agents: list[str] = []
        self._space = ObservationBuilder(most, connections=0, similar=_SIMILAR).space
        self._actions = spaces.Discrete(most + 1)
        self._random = np.random.default_rng()
        self._layers: BackdoorPruneLayersEnv | None = None
        #: How the episode began, and what was done in it.
        self.episode: dict[str, Any] = {}

    def observation_space(self, agent: str) -> spaces.Dict:
        """The same for all."""
        return self._space

    def action_space(self, agent: str) -> spaces.Discrete:
        """The same for all."""
        return self._actions

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode on a network drawn at random; there is no option."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self.episode = {"random": self._random.bit_generator.state, "actions": []}
        self.close()
        self._layers = BackdoorPruneLayersEnv(str(self._random.choice(self.names)), **self._options)
        observations, infos = self._layers.reset()
        self.agents = self.possible_agents[: len(observations)]
        return self._graphs(observations), self._renamed(infos)

    def step(self, actions: dict[str, int]) -> Any:
        """A round."""
        layers = self._layers
        assert layers is not None
        self.episode["actions"].append({agent: int(action) for agent, action in actions.items()})
        own = {
            name: min(int(actions[agent]), len(layers.units[name]))
            for agent, name in zip(self.agents, layers.agents, strict=True)
        }
        observations, rewards, terminated, truncated, infos = layers.step(own)
        found = self._renamed(rewards), self._renamed(terminated), self._renamed(truncated), self._renamed(infos)
        seen = self._graphs(observations)
        if not layers.agents:
            self.agents = []
        return seen, *found

    def play(self, episode: Mapping[str, Any]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """Play an episode again, as far as it was played: the last observations, and what was said at the beginning."""
        self._random.bit_generator.state = episode["random"]
        observations, infos = self.reset()
        for actions in episode["actions"]:
            observations = self.step(actions)[0]
        return observations, infos

    def close(self) -> None:
        """Give back memory."""
        if self._layers is not None:
            self._layers.close()

    def _graphs(self, observations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
        return self._renamed({name: as_graph(seen, self.most) for name, seen in observations.items()})

    def _renamed(self, by_name: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self.agents, by_name.values(), strict=True))


def largest(infected: Sequence[str]) -> tuple[int, int]:
    """Neurons of the widest layer, and layers of the deepest network, of some models."""
    owned = [owners(InfectedGenerator(name, VictimOptions()).get(name).defender) for name in infected]
    return max(len(units) for layers in owned for units in layers.values()), max(map(len, owned))


class LayersVecEnv(VecEnv):
    """The agents of several networks as one Stable-Baselines3 vector environment, for one policy that all of them share.

    Several *seats* play a network each, another of theirs after every episode. Sub-environment i of a seat is the agent of
    the i-th layer; where a network has fewer layers than the deepest one, the others have no neuron and nothing to do but
    stop.

    Args:
        infected: names and files; they are divided among the seats.
        seats: networks played at once.
        **options: of ``BackdoorPruneLayersEnv``, but ``residual`` and ``similar``.

    Raises:
        DataError: fewer models than seats.
    """

    render_mode = None

    def __init__(self, infected: Sequence[str], seats: int = 8, **options: Any) -> None:
        if len(infected) < seats:
            raise DataError(f"{len(infected)} models cannot be divided among {seats} seats; lower seats")
        most, layers = largest(infected)
        self._seats = [PaddedLayersEnv(infected[seat::seats], most, layers, **options) for seat in range(seats)]
        #: Sub-environments of a seat.
        self.slots = layers
        self._returns, self._rounds = [0.0] * seats, [0] * seats
        #: Prunes tried so far: evaluations of a network.
        self.tried = 0
        self._threads = core_threads()
        any_agent = self._seats[0]
        super().__init__(seats * layers, any_agent.observation_space(""), any_agent.action_space(""))

    def reset(self) -> dict[str, np.ndarray]:
        seeds = self._seeds[:: self.slots]
        self._reset_seeds()
        self._reset_options()
        return self._stack([self._begin(seat, seed) for seat, seed in enumerate(seeds)])

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions).reshape(len(self._seats), self.slots)

    def step_wait(self) -> Any:
        chosen = self._actions.reshape(-1, 1)
        legal = np.take_along_axis(self._masks, chosen, axis=1) == 1
        self.tried += int((legal & (chosen < self._masks.shape[1] - 1)).sum())
        played = list(self._threads.map(_play, self._seats, self._actions))
        rewards, dones = np.zeros((len(played), self.slots), dtype=np.float32), np.zeros(len(played), dtype=bool)
        seen, infos = [], []
        for seat, (observations, earned, terminated, truncated, info) in enumerate(played):
            rewards[seat, : len(observations)] = earned
            dones[seat] = terminated or truncated
            self._returns[seat] += earned
            self._rounds[seat] += 1
            mine: list[dict[str, Any]] = [{**info, "TimeLimit.truncated": truncated} for _ in range(self.slots)]
            if dones[seat]:
                for one, observation in zip(mine, self._filled(observations), strict=True):
                    one["terminal_observation"] = observation
                mine[0]["episode"] = {"r": self._returns[seat], "l": self._rounds[seat], "t": 0.0}
                observations = self._begin(seat)
            infos.extend(mine)
            seen.append(observations)
        return self._stack(seen), rewards.ravel(), np.repeat(dones, self.slots), infos

    def close(self) -> None:
        for seat in self._seats:
            seat.close()
        self._threads.shutdown()

    def action_masks(self) -> np.ndarray:
        """The legal actions of every agent, bool (num_envs, N + 1)."""
        return self._masks.astype(bool)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """What a method of this environment says of each agent."""
        found = getattr(self, method_name)(*method_args, **method_kwargs)
        return [found[index] for index in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same of all agents: an attribute of this environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError("the environments of agents of layers change with each episode")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def episodes(self) -> list[dict[str, Any]]:
        """The episodes of all seats so far, for ``play``."""
        return [{**seat.episode, "actions": list(seat.episode["actions"])} for seat in self._seats]

    def play(self, episodes: Mapping[int, Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Play an episode again at each seat; the last observations."""
        played = [self._seats[seat].play(episodes[seat]) for seat in range(len(self._seats))]
        for seat, (_, infos) in enumerate(played):
            self.reset_infos[seat * self.slots : (seat + 1) * self.slots] = [infos["layer_0"]] * self.slots
        return self._stack([list(observations.values()) for observations, _ in played])

    def first_steps(self) -> np.ndarray:
        """Of each agent, whether its episode has just begun."""
        return np.repeat([not seat.episode["actions"] for seat in self._seats], self.slots)

    def _begin(self, seat: int, seed: int | None = None) -> list[dict[str, np.ndarray]]:
        """A new episode; what each agent that there is sees."""
        observations, infos = self._seats[seat].reset(seed=seed)
        for slot in range(self.slots):
            self.reset_infos[seat * self.slots + slot] = infos["layer_0"]
        self._returns[seat], self._rounds[seat] = 0.0, 0
        return list(observations.values())

    def _filled(self, observations: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """With those of agents that are not there."""
        nobody = {key: np.zeros_like(value) for key, value in observations[0].items()}
        nobody["action_mask"][-1] = 1
        return observations + [nobody] * (self.slots - len(observations))

    def _stack(self, seen: Sequence[list[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
        flat = [one for observations in seen for one in self._filled(observations)]
        stacked = {key: np.stack([one[key] for one in flat]) for key in flat[0]}
        self._masks = stacked["action_mask"]
        return stacked


def _play(
    seat: PaddedLayersEnv, actions: np.ndarray
) -> tuple[list[dict[str, np.ndarray]], float, bool, bool, dict[str, Any]]:
    """A round of a seat: what its agents see, and the reward, the ends and the info that they share."""
    observations, *rest = seat.step(dict(zip(seat.agents, actions.tolist(), strict=False)))
    reward, terminated, truncated, info = (found["layer_0"] for found in rest)
    return list(observations.values()), float(reward), terminated, truncated, info


def by_layer(example: Example, owned: Mapping[str, np.ndarray]) -> list[Example]:
    """An example of the warm start as one for each layer's agent.

    Args:
        example: states of a network and what is to be preferred in them.
        owned: units of each of its layers.
    """
    seen = example.observation
    layers = Layers.of(owned, seen["edges"], seen["edge_links"])
    best = example.preference[:, :-1].max(axis=1, keepdims=True)
    liked = example.preference[:, :-1] / np.maximum(best, 1e-12)
    found = []
    for name, units in layers.units.items():
        strengths, links = layers.links[name]
        kinds = np.ones_like(strengths)
        weights = np.column_stack([liked[:, units], np.where(best[:, 0] > 0, STOP, 1.0)])
        found.append(
            Example(
                {
                    "nodes": seen["nodes"][:, units],
                    "edges": np.hstack([strengths, kinds]),
                    "edge_links": links,
                    "num_nodes": np.full_like(seen["num_nodes"], len(units)),
                    "globals": seen["globals"],
                },
                (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32),
                example.value,
            )
        )
    return found
