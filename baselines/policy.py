"""What all policies share: the ``predict`` of Stable-Baselines3, for one observation or a batch of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from backdoor_gym.envs.prune import OBSERVED
from backdoor_gym.errors import DataError

Observation = Mapping[str, np.ndarray]


class Policy(ABC):
    """A pruning policy without learning.

    ``stable_baselines3.common.evaluation.evaluate_policy`` takes it where it takes a trained model.
    """

    #: Whether it looks at the derivatives among the node features; for one that does not, ``repair`` and ``benchmark``
    #: do not take them anew after each few prunes.
    reads_derivatives: ClassVar[bool] = True
    #: The environment that it asks for what no observation tells.
    _env: Any = None

    def set_env(self, env: Any) -> None:
        """Act in this environment from now on."""
        self._env = env

    @abstractmethod
    def act(self, observation: Observation, environment: int) -> int:
        """The action for one observation; ``environment`` is its place in the batch."""

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

        ``action_masks``, bool (N + 1,) or (n, N + 1), are the legal actions in place of those in the observation, as
        sb3_contrib's ``evaluate_policy`` hands them over.

        Raises:
            DataError: the policy needs the environment, and the observation is not the last one of it (``set_env``).
        """
        if action_masks is not None:
            masks = np.asarray(action_masks, dtype=np.int8).reshape(observation["action_mask"].shape)
            observation = {**observation, "action_mask": masks}
        if observation["nodes"].ndim == 2:
            if episode_start is not None and np.any(episode_start):
                self.begin(0)
            return np.array(self.act(observation, 0), dtype=np.int64), state
        actions = []
        for index in range(len(observation["nodes"])):
            if episode_start is not None and episode_start[index]:
                self.begin(index)
            actions.append(self.act({key: value[index] for key, value in observation.items()}, index))
        return np.array(actions, dtype=np.int64), state


def stop_action(observation: Observation) -> int:
    """The action that ends the repair."""
    return len(observation["action_mask"]) - 1


def check_env(policy: Any, env: Any, environment: int, observation: Observation) -> None:
    """Raise ``DataError`` unless the observation is the last one of that environment, which the policy is about to ask."""
    several = getattr(env, "num_envs", environment + 1)
    if environment >= several or not ask(env, environment, "gave", {key: observation[key] for key in OBSERVED}):
        raise DataError(
            f"{type(policy).__name__} was made for another environment than the one that it acts in; call set_env(env) with the "
            "one that the observations come from"
        )


def ask(env: Any, environment: int, method: str, *arguments: Any) -> Any:
    """Call a method of an environment: of a single one, or of one in a Stable-Baselines3 vector environment."""
    if hasattr(env, "env_method"):
        return env.env_method(method, *arguments, indices=[environment])[0]
    if isinstance(env, gym.Env):
        return getattr(env.unwrapped, method)(*arguments)
    raise TypeError(f"a policy is built for a Gymnasium or Stable-Baselines3 environment, not {type(env).__name__}")
