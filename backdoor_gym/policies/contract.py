"""What all policies share: the ``predict`` of Stable-Baselines3, checked observations, and an episode."""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np

from ..envs.observation import GLOBAL_FEATURES, NODE_FEATURES
from ..envs.prune import OBSERVED, BackdoorPruneEnv
from ..errors import DataError
from ..wording import shown

Observation = Mapping[str, np.ndarray]
KEYS = ("nodes", "edges", "edge_links", "num_nodes", "num_edges", "action_mask", "globals")


class PredictingPolicy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Action and state."""


@runtime_checkable
class JudgingPolicy(Protocol):
    """A policy that leaves a network alone where the probability of a backdoor is lower than its threshold."""

    verdict_threshold: float


class Policy(ABC):
    """A pruning policy; Stable-Baselines3's and sb3-contrib's ``evaluate_policy`` take it like a trained model.

    Attributes:
        reads_derivatives: whether it reads the derivatives among the node features; if not, they are not taken anew.
        env: the environment that it asks for what no observation tells, or None.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.baselines import Policy
        >>> class First(Policy):
        ...     def act(self, observation, environment):
        ...         return int(observation["action_mask"].argmax())
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> First().predict(observation)[0].item()
        0
    """

    reads_derivatives: ClassVar[bool] = True
    env: Any = None

    def set_env(self, env: Any) -> None:
        """Act in this environment from now on.

        Raises:
            DataError: it is none.
        """
        if not (env is None or isinstance(env, gym.Env) or hasattr(env, "env_method")):
            raise DataError(
                f"{type(self).__name__} is for a Gymnasium or Stable-Baselines3 environment, not {shown(env)}"
            )
        self.env = env

    @abstractmethod
    def act(self, observation: Observation, environment: int) -> int:
        """The action for one observation; ``environment`` is its place in the batch."""

    def act_on(self, observations: Sequence[Observation], deterministic: bool) -> list[int]:
        """The actions for the observations of a batch."""
        return [self.act(observation, environment) for environment, observation in enumerate(observations)]

    def begin(self, environment: int) -> None:
        """An episode begins there; a policy that remembers something forgets it here."""
        return

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Actions for one observation, int64 (), or for a batch, int64 (n,), and the state as it was given.

        Networks may be of any size. ``action_masks``, bool (N + 1,) or (n, N + 1), replace the legal actions in the
        observation, as sb3-contrib's ``evaluate_policy`` hands them over.

        Raises:
            DataError: no observation of ``BackdoorPrune-v0``, or arguments that do not fit it; or the policy asks its
                environment, and the observation is not the last one of it (``set_env``).
        """
        observation = checked_observation(observation, episode_start, action_masks)
        single = observation["nodes"].ndim == 2
        count = 1 if single else len(observation["nodes"])
        rows = [
            observation if single else {key: value[row] for key, value in observation.items()} for row in range(count)
        ]
        if episode_start is not None:
            for environment in np.flatnonzero(np.broadcast_to(episode_start, count)):
                self.begin(int(environment))
        actions = np.array(self.act_on(rows, deterministic), dtype=np.int64)
        return actions[0] if single else actions, state


def run_episode(
    policy: Any, env: gym.Env[Any, Any], observation: Observation, on_step: Callable[[int], None] | None = None
) -> float:
    """Let anything with ``predict`` act until the episode that has just begun is over, and finish; the sum of the rewards.

    ``on_step`` is called with the number of steps after each.
    """
    core = env.unwrapped
    assert isinstance(core, BackdoorPruneEnv)
    session = core.session
    takes_masks = "action_masks" in inspect.signature(policy.predict).parameters  # MaskablePPO's does
    if not getattr(policy, "reads_derivatives", True):
        session.gradients_every = sys.maxsize
    state, first, done, steps, total = None, np.array([True]), False, 0, 0.0
    try:
        while not done:
            masks = {"action_masks": core.action_masks()} if takes_masks else {}
            action, state = policy.predict(observation, state=state, episode_start=first, deterministic=True, **masks)
            observation, reward, terminated, truncated, _ = env.step(int(np.asarray(action).item()))
            total, steps = total + float(reward), steps + 1
            first, done = np.array([False]), terminated or truncated
            if on_step is not None:
                on_step(steps)
        return total + finish(policy, core)
    finally:
        session.gradients_every = core.gradients_every


def finish(policy: Any, env: BackdoorPruneEnv) -> float:
    """Let a policy with a method ``finish(env)`` do what it does when an episode is over; the reward of it.

    ONP gives back there what need not have been pruned; other policies end with the episode.
    """
    method = getattr(policy, "finish", None)
    return 0.0 if method is None else float(method(env))


def checked_observation(observation: Any, episode_start: Any = None, action_masks: Any = None) -> dict[str, np.ndarray]:
    """The observation, or the batch of them, with the legal actions that are given in place of its own.

    Raises:
        DataError: it is none of ``BackdoorPrune-v0``, or what comes with it does not fit it.
    """
    if not isinstance(observation, Mapping) or not observation.keys() >= set(KEYS):
        raise DataError(f"an observation must be a dict with {', '.join(KEYS)}, not {shown(observation)}")
    arrays = {key: observation[key] for key in KEYS}
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or not np.isfinite(value).all():
            raise DataError(f"{key} of an observation must be an array of finite numbers, not {shown(value)}")
    batch, rows = arrays["nodes"].shape[:-2], arrays["nodes"].shape[-2:-1]
    if arrays["nodes"].ndim not in (2, 3) or arrays["edges"].ndim != arrays["nodes"].ndim:
        raise DataError("nodes and edges of an observation must have two axes, or three in a batch")
    most = {"num_nodes": rows[0], "num_edges": arrays["edges"].shape[-2]}
    shapes: dict[str, tuple[int, ...]] = {
        "nodes": (*rows, len(NODE_FEATURES)),
        "edges": (most["num_edges"], 2),
        "edge_links": (most["num_edges"], 2),
        "num_nodes": (1,),
        "num_edges": (1,),
        "action_mask": (rows[0] + 1,),
        "globals": (len(GLOBAL_FEATURES),),
    }
    for key, shape in shapes.items():
        if arrays[key].shape != batch + shape:
            raise DataError(f"{key} of an observation must have the shape {batch + shape}, not {arrays[key].shape}")
    if action_masks is not None:
        shape = arrays["action_mask"].shape
        try:
            arrays["action_mask"] = np.asarray(action_masks).astype(np.int8).reshape(shape)
        except (TypeError, ValueError):
            raise DataError(f"action_masks must be bool {shape}, not {shown(action_masks)}") from None
    if not arrays["action_mask"].any(-1).all():
        raise DataError("an observation in which no action is legal: stopping always is")
    for key, count in most.items():
        if not ((arrays[key] >= 0) & (arrays[key] <= count)).all():
            raise DataError(f"{key} of an observation must be 0 to {count}")
    links = arrays["edge_links"]
    if links.size and not 0 <= links.min() <= links.max() < max(1, rows[0]):
        raise DataError(f"edge_links of an observation must be 0 to {rows[0] - 1}, two an edge")
    if episode_start is not None and np.shape(episode_start) not in ((), (1,), batch):
        raise DataError(f"episode_start must be bool {batch}, not {shown(episode_start)}")
    return {**observation, **arrays}


def stop_action(observation: Observation) -> int:
    """The action that ends the repair."""
    return len(observation["action_mask"]) - 1


def check_env(policy: Any, env: Any, environment: int, observation: Observation) -> None:
    """Raise ``DataError`` unless that environment, which the policy is about to ask, gave the observation last."""
    name = type(policy).__name__
    if env is None:
        raise DataError(f"{name} needs the environment that it acts in: {name}(env)")
    several = getattr(env, "num_envs", environment + 1)
    if environment >= several or not ask(env, environment, "gave", {key: observation[key] for key in OBSERVED}):
        raise DataError(
            f"{name} was made for another environment than the one that it acts in; call set_env(env) with the "
            "one that the observations come from"
        )


def ask(env: Any, environment: int, method: str, *arguments: Any) -> Any:
    """Call a method of an environment: of a single one, or of one in a Stable-Baselines3 vector environment."""
    if hasattr(env, "env_method"):
        return env.env_method(method, *arguments, indices=[environment])[0]
    return getattr(env.unwrapped, method)(*arguments)
