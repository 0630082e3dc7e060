"""Checkpoints of a training: one that goes on from its checkpoint comes to what it would have come to in one go."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import UNSET
from stable_baselines3.common.callbacks import BaseCallback

from backdoor_gym.errors import BackdoorGymError, ModelFileError
from backdoor_gym.files.tensors import read_tensors, write_tensors

from .policy_files import CHECKPOINT, check_weights, optimizer_state, read_policy

if TYPE_CHECKING:
    from .onp import ONP


class Checkpoints(BaseCallback):
    """Writes, before every rollout, all that a training needs to go on: weights, optimizer, steps, random numbers, episodes.

    Of an episode it is how it began and what was done in it, where the vector environment has ``episodes`` and ``play``:
    others begin new episodes when the training goes on. Callbacks with ``progress`` and ``go_on`` are asked.

    Args:
        onp: what is trained.
        path: the file.
        callbacks: the others of this training.
    """

    def __init__(self, onp: "ONP", path: Path, callbacks: Sequence[Any]) -> None:
        super().__init__()
        self.onp, self.path = onp, path
        self.resumable = {type(callback).__name__: callback for callback in callbacks if hasattr(callback, "progress")}

    def _on_training_start(self) -> None:
        self.save()

    def _on_rollout_start(self) -> None:
        if self.n_calls:
            self.save()

    def _on_step(self) -> bool:
        return True

    def save(self) -> None:
        """Write the file."""
        ppo = self.onp.trainer()
        tensors = {f"network.{key}": value for key, value in self.onp.network.state_dict().items()}
        for index, entry in ppo.policy.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        facts = {"format": CHECKPOINT, "timesteps": int(ppo.num_timesteps), "progress": self._progress(ppo)}
        write_tensors(self.path, tensors, self.onp.description() | facts)

    def _progress(self, ppo: Any) -> dict[str, Any]:
        episodes = ppo.env.episodes() if hasattr(ppo.env, "episodes") and ppo._last_obs is not None else [None]
        drawn: Any = np.random.get_state(legacy=False)
        drawn["state"] = {"key": drawn["state"]["key"].tolist(), "pos": int(drawn["state"]["pos"])}
        return {
            "torch": torch.get_rng_state().numpy().tobytes().hex(),
            "numpy": drawn,
            "episodes": None if None in episodes else episodes,
            "callbacks": {name: callback.progress() for name, callback in self.resumable.items()},
        }

    def resume(self) -> int:
        """Take over the file, if it is there; the number of steps it has seen.

        Raises:
            ModelFileError: it is not readable, or of another network or training.
        """
        if not self.path.is_file():
            return 0
        onp, path, ppo = self.onp, self.path, self.onp.trainer()
        tensors, metadata = read_tensors(path)
        policy = read_policy(metadata, CHECKPOINT, path)
        if policy.encoder != onp.options:
            raise ModelFileError(f"{path} is the checkpoint of a network of another shape; remove it, or name another")
        network = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
        check_weights(policy.encoder, network, path)
        state = optimizer_state(tensors, list(onp.network.parameters()), path)
        onp.network.load_state_dict(network)
        optimizer = ppo.policy.optimizer
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        onp.facts["timesteps"] = policy.fields.facts.get("timesteps", 0)
        if policy.fields.progress is not UNSET:
            try:
                self._go_on(ppo, policy.fields.progress)
            except BackdoorGymError:
                raise
            except Exception as error:  # whatever a file says, reading it must end in one clear line
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ModelFileError(
                    f"{path} is the checkpoint of another training ({reason}); remove it, or name another"
                ) from error
        return policy.fields.timesteps

    def _go_on(self, ppo: Any, progress: dict[str, Any]) -> None:
        for name, done in dict(progress["callbacks"]).items():
            if name in self.resumable:
                self.resumable[name].init_callback(ppo)
                self.resumable[name].go_on(done)
        if progress["episodes"] is not None:
            ppo._last_obs = ppo.env.play(dict(enumerate(progress["episodes"])))
            ppo._last_episode_starts = ppo.env.first_steps()
        np.random.set_state(progress["numpy"])
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(progress["torch"]), dtype=torch.uint8))
