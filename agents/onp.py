"""ONP: a graph policy, learned by reinforcement, that prunes the backdoor out of networks.

After "Rethinking Pruning for Backdoor Mitigation: An Optimization Perspective" (Li, Yu and Yi, 2024, arXiv:2405.17746): the
network as a graph of neurons, a GNN that embeds them, and a pruning policy learned with PPO from a little clean data.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback

from backdoor_gym.baselines.policy import check_env
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError, ModelFileError
from backdoor_gym.zoo.files import read_tensors, write_tensors

from .encoder import EncoderOptions, GraphActorCritic, encoder_facts
from .graph_policy import GraphPolicy, as_tensors
from .look_ahead import LookAhead
from .restoring import restore
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
            if not 0 < value < 1:
                raise DataError(f"{name} must lie between 0 and 1, it is {value}")
        self.look_ahead = look_ahead
        self.threshold, self.verdict_threshold = threshold, verdict_threshold
        self.options = encoder or EncoderOptions()
        self.device = torch.device(device)
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
        """Learn and look ahead in this environment from now on; what was learned is kept."""
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
            DataError: a look-ahead, and an observation that is not the last one of the environment.
        """
        single = np.ndim(observation["nodes"]) == 2
        logits = self.logits(observation)
        actions = []
        for index, row in enumerate(logits):
            one = observation if single else {key: value[index] for key, value in observation.items()}
            legal = one["action_mask"] if action_masks is None else np.atleast_2d(action_masks)[index]
            row = np.where(np.asarray(legal).astype(bool), row, -np.inf)
            if not deterministic:
                chances = np.exp(row - row.max())
                actions.append(int(self._random.choice(len(row), p=chances / chances.sum())))
            else:
                actions.append(self._best(row, {**one, "action_mask": np.asarray(legal)}, index))
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
            DataError: something is pruned already.
        """
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
        encoder = _encoder_of(path, metadata, FORMAT)
        saved = metadata.get("look_ahead")
        options.setdefault("look_ahead", None if saved is None else LookAhead(**saved))
        if "threshold" not in options:
            options["threshold"] = metadata.get("threshold", 0.5)
            options.setdefault("verdict_threshold", metadata.get("verdict_threshold"))
        onp = cls(env, encoder=encoder, **options)
        _fill(onp.network, tensors, path)
        onp.facts = dict(metadata.get("facts", {}))
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
            "facts": self.facts,
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
        if _encoder_of(path, metadata, CHECKPOINT) != self.options:
            raise ModelFileError(f"{path} is the checkpoint of a network of another shape; remove it, or name another")
        network = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
        _fill(self.network, network, path)
        optimizer = self._trainer().policy.optimizer
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.facts["timesteps"] = metadata["facts"].get("timesteps", 0)
        if "progress" in metadata:
            go_on(self._trainer(), self._callbacks, metadata["progress"], path)
        return int(metadata["timesteps"])


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


def _encoder_of(path: Any, metadata: Mapping[str, Any], kind: str) -> EncoderOptions:
    if metadata.get("format") != kind:
        raise ModelFileError(f"{path} is no file of the kind {kind}, but {metadata.get('format', 'an infected model')}")
    described = metadata["encoder"]
    options = EncoderOptions(**described["options"])
    if described != encoder_facts(options):
        raise ModelFileError(f"{path} was made for other features than those of this version of backdoor-gym")
    return options


def _fill(network: GraphActorCritic, tensors: Mapping[str, torch.Tensor], path: Any) -> None:
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ModelFileError(f"{path} does not hold the weights of its network: {error}") from error
