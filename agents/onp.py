"""ONP: a graph policy, learned by reinforcement, that prunes the backdoor out of networks.

After "Rethinking Pruning for Backdoor Mitigation: An Optimization Perspective" (Li, Yu and Yi, 2024, arXiv:2405.17746): the
network as a graph of neurons, a GNN that embeds them, and a pruning policy learned with PPO from a little clean data.
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

from backdoor_gym.analysis.evidence import VERDICT_THRESHOLD
from backdoor_gym.arguments import check_kind, check_path, check_whole
from backdoor_gym.devices import find_device
from backdoor_gym.errors import DataError, check_name
from backdoor_gym.files.schemas import free
from backdoor_gym.files.tensors import read_tensors, write_tensors

from .encoder import EncoderOptions, GraphActorCritic, encoder_facts
from .graph_policy import GraphPolicy
from .look_ahead import LookAhead
from .policy_files import FORMAT, check_weights, read_policy
from .resuming import Checkpoints
from .rollout_buffer import GraphRolloutBuffer
from .scoring import ScoringPolicy

PRETRAINED = "pretrained"
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


class ONP(ScoringPolicy):
    """A pruning policy that learns, and acts on networks of any size.

        onp = ONP.load("pretrained", env)
        action, _ = onp.predict(observation, deterministic=True)

    Args:
        env: a ``BackdoorPrune-v0``, or a Stable-Baselines3 vector environment of them; None to act on observations alone.
        look_ahead: of ``ScoringPolicy``.
        threshold: of ``ScoringPolicy``.
        verdict_threshold: of ``ScoringPolicy``.
        encoder: shape of the network.
        seed: of initialisation, sampling and training.
        device: where the policy is computed.
        tensorboard_log: folder for TensorBoard, or None.
        ppo: arguments of ``MaskablePPO`` in place of those in ``PPO``.

    Attributes:
        facts: what the file of the policy tells of its training, JSON-able.

    Raises:
        DataError: the observations are not those of ``BackdoorPrune-v0``, or an argument is out of range.

    Examples:
        >>> import gymnasium as gym
        >>> from backdoor_gym.agents import ONP
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, _ = env.reset(seed=0)
        >>> onp = ONP.load("pretrained", env)
        >>> action, _ = onp.predict(observation, deterministic=True)
        >>> env.step(action)[-1]["neuron"]
        'layer2.0.conv1[14]'
    """

    def __init__(
        self,
        env: Any = None,
        *,
        look_ahead: LookAhead | None = None,
        threshold: float = 0.5,
        verdict_threshold: float = VERDICT_THRESHOLD,
        encoder: EncoderOptions | None = None,
        seed: int | None = None,
        device: str = "cpu",
        tensorboard_log: str | Path | None = None,
        **ppo: Any,
    ) -> None:
        check_kind("encoder", encoder, EncoderOptions, "an EncoderOptions", may_be_none=True)
        check_path("tensorboard_log", tensorboard_log, may_be_none=True)
        check_whole("seed", seed, may_be_none=True)
        known = inspect.signature(MaskablePPO).parameters.keys() - OWN
        for option in ppo:
            check_name("option of MaskablePPO", option, known)
        self.options = encoder or EncoderOptions()
        self.device = find_device(device)
        self.facts: dict[str, Any] = {}
        self._settings = {**PPO, **ppo}
        self._seed = seed
        self._log = None if tensorboard_log is None else str(tensorboard_log)
        self._ppo: MaskablePPO | None = None
        if seed is not None:
            torch.manual_seed(seed)
        super().__init__(
            GraphActorCritic(self.options).to(self.device),
            env,
            look_ahead=look_ahead,
            threshold=threshold,
            verdict_threshold=verdict_threshold,
            seed=seed,
        )

    @property
    def network(self) -> GraphActorCritic:
        """The scorer."""
        return cast(GraphActorCritic, self.scorer)

    def set_env(self, env: Any) -> None:
        """Learn and look ahead in this environment from now on; what was learned is kept."""
        super().set_env(env)
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
            progress_bar: whether to draw a bar.
            checkpoint: file written before every rollout. Where it exists, learning goes on from it, and with the
                environments of ``school`` comes to what it would have come to in one go.

        Raises:
            DataError: there is no environment to learn in.
            ModelFileError: the checkpoint is not readable, or is of another network.
        """
        check_whole("total_timesteps", total_timesteps)
        check_path("checkpoint", checkpoint, may_be_none=True)
        ppo = self.trainer()
        callbacks: list[Any] = list(callback) if isinstance(callback, list) else [] if callback is None else [callback]
        checkpoints = None if checkpoint is None else Checkpoints(self, Path(checkpoint), callbacks)
        ppo.num_timesteps = 0 if checkpoints is None else checkpoints.resume()
        before = self.num_timesteps
        if total_timesteps > ppo.num_timesteps:
            ppo.learn(
                total_timesteps - ppo.num_timesteps,
                callback=[
                    each if isinstance(each, BaseCallback) else ConvertCallback(each)
                    for each in (*([checkpoints] if checkpoints else []), *callbacks)
                ],
                reset_num_timesteps=False,
                progress_bar=progress_bar,
                tb_log_name="onp",
            )
            if checkpoints is not None and ppo.num_timesteps >= total_timesteps:
                checkpoints.save()
        self.facts["timesteps"] = before + ppo.num_timesteps
        return self

    def trainer(self) -> MaskablePPO:
        """The learner, which trains the network in place."""
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
            self.scorer = cast(GraphActorCritic, self._ppo.policy.network)
            self.network.load_state_dict(learned)
        return self._ppo

    def save(self, path: str | Path) -> Path:
        """Write the policy as safetensors with JSON metadata; raises ``WriteError`` where that cannot be."""
        path = Path(path)
        write_tensors(path, self.network.state_dict(), {**self.description(), "format": FORMAT})
        return path

    def description(self) -> dict[str, Any]:
        """What a file tells of the policy beside its weights, JSON-able."""
        return {
            "encoder": encoder_facts(self.options),
            "look_ahead": None if self.look_ahead is None else asdict(self.look_ahead),
            "threshold": self.threshold,
            "facts": free(self.facts, "the policy"),
        }

    @classmethod
    def load(cls, path: str | Path = PRETRAINED, env: Any = None, **options: Any) -> "ONP":
        """A saved policy, or the one that comes with the package.

        Args:
            path: a file, or "pretrained".
            env: the environment to act or learn in.
            options: of ``ONP``, in place of what was saved.

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
        options.setdefault("threshold", policy.fields.threshold)
        onp = cls(env, encoder=policy.encoder, **options)
        onp.network.load_state_dict(tensors)
        onp.facts = free(metadata["facts"], str(path))
        return onp
