"""ONP: a graph policy, learned by reinforcement, that prunes the backdoor out of networks.

After "Rethinking Pruning for Backdoor Mitigation: An Optimization Perspective" (Li, Yu and Yi, 2024, arXiv:2405.17746): the
network as a graph of neurons, a GNN that embeds them, and a pruning policy learned with PPO from a little clean data.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from backdoor_gym.arguments import check_kind, check_path, check_whole, is_finite
from backdoor_gym.baselines.policy import check_env, checked_observation
from backdoor_gym.devices import find_device
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError, ModelFileError, check_name
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.wording import shown
from backdoor_gym.writing import finite

from .backward_elimination import restore
from .encoder import EncoderOptions, GraphActorCritic, encoder_facts
from .graph_policy import GraphPolicy, as_tensors
from .look_ahead import LookAhead
from .policy_files import check_weights, optimizer_state, read_policy
from .resuming import go_on, progress_of
from .rollout_buffer import GraphRolloutBuffer

_PRUNED, _TRIED = (NODE_FEATURES.index(name) for name in ("pruned", "tried"))
PRETRAINED = "pretrained"
FORMAT = "onp-policy"
CHECKPOINT = "onp-checkpoint"

#: MaskablePPO's arguments where ONP departs from its defaults.
PPO: dict[str, Any] = {
    "learning_rate": 1e-3,
    "n_steps": 64,
    "batch_size": 256,
    "n_epochs": 4,
    "gamma": 0.9,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "ent_coef": 0.01,
}
#: Arguments of MaskablePPO that ONP gives it itself.
OWN = {"policy", "env", "rollout_buffer_class", "policy_kwargs", "seed", "device", "tensorboard_log"}


class ONP:
    """A pruning policy that learns, and acts on networks of any size.

    Args:
        env: a ``BackdoorPrune-v0`` environment, or a Stable-Baselines3 vector environment of them; None for a policy
            that only acts on observations.
        look_ahead: whether and how ``predict`` looks ahead; it needs the environment. None for no look-ahead.
        threshold: probability of going on, with any neuron, below which ``predict`` stops where actions are deterministic.
        verdict_threshold: the same before the first prune, where that probability is the verdict; None for the same.
        encoder: shape of the network.
        seed: of initialisation, sampling and training.
        device: where the policy is computed.
        tensorboard_log: folder for TensorBoard, None for none.
        ppo: arguments of ``MaskablePPO`` in place of those in ``PPO``.

    Raises:
        DataError: the environment's observations are not those of ``BackdoorPrune-v0``, or a threshold out of range.
    """

    def __init__(
        self,
        env: Any = None,
        *,
        look_ahead: LookAhead | None = None,
        threshold: float = 0.5,
        verdict_threshold: float | None = None,
        encoder: EncoderOptions | None = None,
        seed: int | None = None,
        device: str = "cpu",
        tensorboard_log: str | Path | None = None,
        **ppo: Any,
    ) -> None:
        verdict_threshold = threshold if verdict_threshold is None else verdict_threshold
        for name, value in (("threshold", threshold), ("verdict_threshold", verdict_threshold)):
            if not is_finite(value) or not 0 < value < 1:
                raise DataError(f"{name} must lie between 0 and 1, it is {shown(value)}")
        check_kind("look_ahead", look_ahead, LookAhead, "a LookAhead", may_be_none=True)
        check_kind("encoder", encoder, EncoderOptions, "an EncoderOptions", may_be_none=True)
        check_path("tensorboard_log", tensorboard_log, may_be_none=True)
        check_whole("seed", seed, may_be_none=True)
        known = inspect.signature(MaskablePPO).parameters.keys() - OWN
        for option in ppo:
            check_name("option of MaskablePPO", option, known)
        self.look_ahead = look_ahead
        self.threshold, self.verdict_threshold = threshold, verdict_threshold
        self.options = encoder or EncoderOptions()
        self.device = find_device(device)
        self.facts: dict[str, Any] = {}
        self._settings = {**PPO, **ppo}
        self._seed = seed
        self._log = None if tensorboard_log is None else str(tensorboard_log)
        self._random = np.random.default_rng(seed)
        self._ppo: MaskablePPO | None = None
        self._callbacks: list[Any] = []
        self.env: Any = None
        if seed is not None:
            torch.manual_seed(seed)
        self.network = GraphActorCritic(self.options).to(self.device)
        if env is not None:
            self.set_env(env)

    def set_env(self, env: Any) -> None:
        """Learn and look ahead in this environment from now on; what was learned is kept.

        Raises:
            DataError: it is none.
        """
        if env is not None and not isinstance(env, gym.Env | VecEnv):
            raise DataError(f"ONP is for a Gymnasium or Stable-Baselines3 environment, not {shown(env)}")
        self.env = env
        self._ppo = None

    @property
    def num_timesteps(self) -> int:
        """Steps that were learned from."""
        return int(self.facts.get("timesteps", 0))

    def learn(
        self,
        total_timesteps: int,
        *,
        callback: BaseCallback | list[BaseCallback] | Callable[..., Any] | None = None,
        progress_bar: bool = False,
        checkpoint: str | Path | None = None,
    ) -> "ONP":
        """Learn for so many steps more.

        Args:
            total_timesteps: environment steps, those that a checkpoint has seen included.
            callback: Stable-Baselines3 callbacks.
            progress_bar: whether to draw one.
            checkpoint: file written after every rollout. Where it exists, learning goes on from it: with its weights,
                the state of the optimizer, the number of steps, the random numbers and, with the environments of ``school``,
                the episodes: it comes to what it would have come to in one go.

        Raises:
            DataError: there is no environment to learn in.
            ModelFileError: the checkpoint is not readable, or is of another network.
        """
        check_whole("total_timesteps", total_timesteps)
        check_path("checkpoint", checkpoint, may_be_none=True)
        ppo = self._trainer()
        callbacks: list[Any] = []
        done = 0
        if checkpoint is not None:
            path = Path(checkpoint)
            callbacks.append(_Checkpoints(self, path))
        if isinstance(callback, list):
            callbacks.extend(callback)
        elif callback is not None:
            callbacks.append(callback)
        self._callbacks = callbacks
        if checkpoint is not None and path.is_file():
            done = self._resume(path)
        ppo.num_timesteps = done
        before = self.num_timesteps
        if total_timesteps > done:
            ppo.learn(
                total_timesteps - done,
                callback=[_as_callback(one) for one in callbacks],
                reset_num_timesteps=False,
                progress_bar=progress_bar,
                tb_log_name="onp",
            )
            if checkpoint is not None and ppo.num_timesteps >= total_timesteps:
                self.save_checkpoint(checkpoint)
        self.facts["timesteps"] = before + ppo.num_timesteps
        return self

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Actions for one observation, int64 (), or for a batch, int64 (n,), and the state as it was given.

        Observations may be of another size than those learned from. Where actions are deterministic a look-ahead asks the
        environment that the observations come from, see ``set_env``, and when the episode is over ``finish`` belongs to it.

        Raises:
            DataError: no observation of ``BackdoorPrune-v0``, or arguments that do not fit it; a look-ahead, and an observation
                that is not the last one of the environment.
        """
        observation = checked_observation(observation, episode_start, action_masks)
        single = np.ndim(observation["nodes"]) == 2
        logits = self.logits(observation)
        actions = []
        for index, row in enumerate(logits):
            one = observation if single else {key: value[index] for key, value in observation.items()}
            row = np.where(one["action_mask"].astype(bool), row, -np.inf)
            if not deterministic:
                chances = np.exp(row - row.max())
                actions.append(int(self._random.choice(len(row), p=chances / chances.sum())))
            else:
                actions.append(self._best(row, one, index))
        return np.array(actions[0] if single else actions, dtype=np.int64), state

    def _best(self, logits: np.ndarray, observation: Mapping[str, np.ndarray], environment: int) -> int:
        """To stop where going on, with any neuron, has odds below the threshold, or the look-ahead says so; else the best.

        No single neuron of hundreds could outweigh stopping, so it is all of them together that are weighed against it.
        """
        stop = len(logits) - 1
        odds = np.logaddexp.reduce(logits[:-1].astype(np.float64)) - logits[-1]
        look = self.look_ahead
        if look is not None and self.env is not None:
            check_env(self, self.env, environment, observation)
        begun = bool(observation["nodes"][:, [_PRUNED, _TRIED]].any())
        threshold = self.threshold if begun else self.verdict_threshold
        if odds < np.log(threshold / (1 - threshold)) or (
            look is not None and look.is_done(observation, self.env, environment)
        ):
            return stop
        if look is not None and self.env is not None:
            logits = look.correct(logits, observation, self.env, environment)
        best = int(logits[:-1].argmax())
        return stop if np.isneginf(logits[best]) else best

    def finish(self, env: BackdoorPruneEnv) -> float:
        """After an episode: give back what need not have been pruned, if the look-ahead says so. The reward of it."""
        if self.look_ahead is None or not self.look_ahead.restore:
            return 0.0
        return restore(env, self.look_ahead)

    def verdict(self, observation: Mapping[str, np.ndarray]) -> float:
        """Probability that a network has a backdoor: that the policy would not stop at once, seen before any prune.

        Raises:
            DataError: something is pruned already, or it is no observation of ``BackdoorPrune-v0``.
        """
        observation = checked_observation(observation)
        if observation["nodes"][..., _PRUNED].any():
            raise DataError("the verdict is on the network as it came: ask before the first prune")
        row = self.logits(observation)[0].astype(np.float64)
        legal = row[np.flatnonzero(observation["action_mask"])]
        return float(1 - np.exp(row[-1] - legal.max()) / np.exp(legal - legal.max()).sum())

    @torch.no_grad()
    def logits(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the network gives each action, float32 (n, N + 1)."""
        self.network.eval()
        return self.network(as_tensors(observation, self.device))[0].cpu().numpy()

    def save(self, path: str | Path) -> Path:
        """Write the policy as safetensors with JSON metadata.

        Raises:
            OSError: the folder cannot be written.
        """
        path = Path(path)
        write_tensors(path, self.network.state_dict(), {**self._description(), "format": FORMAT})
        return path

    @classmethod
    def load(cls, path: str | Path = PRETRAINED, env: Any = None, **options: Any) -> "ONP":
        """A saved policy, or the one that comes with the package.

        Args:
            path: a file, or "pretrained".
            env: the environment to act or learn in.
            options: other arguments of ``ONP``; ``look_ahead`` and the thresholds are the saved ones where they are not given;
                ``threshold`` alone gives both.

        Raises:
            ModelFileError: not a readable file of a policy, or one for other features.
        """
        if str(path) == PRETRAINED:
            with resources.as_file(resources.files(__package__) / "pretrained.safetensors") as file:
                tensors, metadata = read_tensors(file)
        else:
            tensors, metadata = read_tensors(Path(path))
        policy = read_policy(metadata, FORMAT, path)
        check_weights(policy.encoder, tensors, path)
        options.setdefault("look_ahead", policy.look_ahead)
        if "threshold" not in options:
            options["threshold"] = policy.threshold
            options.setdefault("verdict_threshold", policy.verdict_threshold)
        onp = cls(env, encoder=policy.encoder, **options)
        onp.network.load_state_dict(tensors)
        onp.facts = dict(policy.facts)
        return onp

    def _trainer(self) -> MaskablePPO:
        if self.env is None:
            raise DataError("ONP needs an environment to learn in: ONP(env), or set_env(env)")
        if self._ppo is None:
            learned = self.network.state_dict()
            self._ppo = MaskablePPO(
                GraphPolicy,
                self.env,
                rollout_buffer_class=GraphRolloutBuffer,
                policy_kwargs=asdict(self.options),
                seed=self._seed,
                device=self.device,
                tensorboard_log=self._log,
                **self._settings,
            )
            self.network = self._ppo.policy.network  # type: ignore[assignment]
            self.network.load_state_dict(learned)
        return self._ppo

    def _description(self) -> dict[str, Any]:
        return {
            "encoder": encoder_facts(self.options),
            "look_ahead": None if self.look_ahead is None else asdict(self.look_ahead),
            "threshold": self.threshold,
            "verdict_threshold": self.verdict_threshold,
            "facts": finite(self.facts),
        }

    def save_checkpoint(self, path: str | Path) -> None:
        """Write weights, state of the optimizer and number of steps, for ``learn(checkpoint=...)`` to go on from."""
        ppo = self._trainer()
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        optimizer = ppo.policy.optimizer.state_dict()
        for index, entry in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        write_tensors(
            Path(path),
            tensors,
            {
                **self._description(),
                "format": CHECKPOINT,
                "timesteps": int(ppo.num_timesteps),
                "progress": progress_of(ppo, self._callbacks),
            },
        )

    def _resume(self, path: Path) -> int:
        """Take over a checkpoint; the number of steps it has seen."""
        tensors, metadata = read_tensors(path)
        policy = read_policy(metadata, CHECKPOINT, path)
        if policy.encoder != self.options:
            raise ModelFileError(f"{path} is the checkpoint of a network of another shape; remove it, or name another")
        network = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
        check_weights(policy.encoder, network, path)
        optimizer = self._trainer().policy.optimizer
        state = optimizer_state(tensors, list(self.network.parameters()), path)
        self.network.load_state_dict(network)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.facts["timesteps"] = policy.facts.get("timesteps", 0)
        if policy.progress is not None:
            go_on(self._trainer(), self._callbacks, policy.progress, path)
        return policy.timesteps


class _Checkpoints(BaseCallback):
    """Writes a checkpoint before every rollout."""

    def __init__(self, onp: ONP, path: Path) -> None:
        super().__init__()
        self.onp, self.path = onp, path

    def _on_training_start(self) -> None:
        self.onp.save_checkpoint(self.path)

    def _on_rollout_start(self) -> None:
        if self.n_calls:
            self.onp.save_checkpoint(self.path)

    def _on_step(self) -> bool:
        return True


def _as_callback(callback: Any) -> BaseCallback:
    from stable_baselines3.common.callbacks import ConvertCallback

    return callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)
