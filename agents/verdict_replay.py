"""The verdict, rehearsed while the policy learns to repair."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch.nn import functional as F

from .encoder import OBSERVED, as_tensors
from .graph_policy import GraphPolicy

#: Gradient steps before each rollout, and models in each step.
STEPS, BATCH_SIZE = 4, 32


class VerdictReplay(BaseCallback):
    """Keeps the first observation of each training model, and before each rollout fits on a few whether to stop at once.

    A clean network makes an episode of one step where an infected one makes forty: without this, reinforcement forgets
    what tells a clean network. Models are drawn as they come, clean or not. It is for the oracle reward, with models
    that are known to be clean or not.

    Args:
        seed: of their choice.
    """

    model: Any

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = np.random.default_rng(seed)
        #: Name of a model -> its first observation, and whether it is clean.
        self._seen: dict[str, tuple[dict[str, np.ndarray], bool]] = {}
        #: Name of a model -> the sub-environment that met it, and how its episode began there, if that is known.
        self._met: dict[str, tuple[int, Any]] = {}

    def _on_training_start(self) -> None:
        for index in range(self.training_env.num_envs):
            self._remember(self.model._last_obs, index)

    def _on_step(self) -> bool:
        for index in np.flatnonzero(self.locals["dones"]):
            self._remember(self.locals["new_obs"], int(index))
        return True

    def _on_rollout_start(self) -> None:
        if len({clean for _, clean in self._seen.values()}) == 2:
            losses = [self._fit() for _ in range(STEPS)]
            self.logger.record("train/verdict_loss", float(np.mean(losses)))

    def _remember(self, observations: Any, index: int) -> None:
        before = self.training_env.reset_infos[index]
        name = before["infected"]
        if name not in self._seen:
            clean = "asr" not in before  # there is no attack that could succeed
            self._seen[name] = {key: observations[key][index].copy() for key in OBSERVED}, clean
            episodes = self.training_env.episodes() if hasattr(self.training_env, "episodes") else None
            self._met[name] = index, None if episodes is None else episodes[index]

    def progress(self) -> dict[str, Any]:
        """How the models that were seen are seen again, and the random numbers, JSON-able."""
        return {"met": list(self._met.values()), "random": self._random.bit_generator.state}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """See again what was seen."""
        for index, episode in progress["met"]:
            if episode is not None:
                self._remember(self.training_env.play({index: episode}), index)  # type: ignore[attr-defined]
        self._random.bit_generator.state = progress["random"]

    def _fit(self) -> float:
        names = self._random.choice(sorted(self._seen), BATCH_SIZE)
        observations, clean = zip(*(self._seen[str(name)] for name in names), strict=True)
        policy = self.model.policy
        assert isinstance(policy, GraphPolicy)
        policy.set_training_mode(True)
        batch = {key: np.stack([observation[key] for observation in observations]) for key in OBSERVED}
        logits, _ = policy.network(as_tensors(batch, policy.device))
        odds = logits[:, -1] - logits[:, :-1].logsumexp(1)
        loss = F.binary_cross_entropy_with_logits(odds, torch.tensor(clean).to(odds))
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
        return loss.item()
