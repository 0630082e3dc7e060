"""ONP's network as a Stable-Baselines3 policy: ``MaskablePPO(GraphPolicy, env)``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import Tensor
from torch.distributions import Categorical

from backdoor_gym.errors import DataError

from .embedding_cache import EmbeddingCache
from .encoder import OBSERVED, EncoderOptions, GraphActorCritic


class GraphPolicy(MaskableActorCriticPolicy):
    """A logit of each neuron from ``GraphActorCritic``, in place of a fixed linear layer over all actions.

    Args:
        observation_space: of ``BackdoorPrune-v0``.
        action_space: of ``BackdoorPrune-v0``.
        lr_schedule: step size from the share of training that is left.
        hidden: this and the next four are those of ``EncoderOptions``.
        hops: rounds.
        heads: attention heads.
        message_passing: whether a round sees the edges.
        ignore: features that are hidden.
        kwargs: other arguments of ``MaskableActorCriticPolicy``, such as ``optimizer_kwargs``.

    Raises:
        DataError: the observations are not those of ``BackdoorPrune-v0``.

    Examples:
        >>> import gymnasium as gym
        >>> from sb3_contrib import MaskablePPO
        >>> from backdoor_gym.agents import GraphPolicy
        >>> model = MaskablePPO(GraphPolicy, gym.make("backdoor_gym:BackdoorPrune-v0"))
        >>> sum(parameter.numel() for parameter in model.policy.parameters())
        17955
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Any,
        hidden: int = EncoderOptions.hidden,
        hops: int = EncoderOptions.hops,
        heads: int = EncoderOptions.heads,
        message_passing: bool = EncoderOptions.message_passing,
        ignore: Sequence[str] = EncoderOptions.ignore,
        **kwargs: Any,
    ) -> None:
        if not isinstance(observation_space, spaces.Dict) or not set(OBSERVED) <= set(observation_space.spaces):
            raise DataError(f"GraphPolicy needs the observations of BackdoorPrune-v0, with {', '.join(OBSERVED)}")
        self.options = EncoderOptions(hidden, hops, heads, message_passing, tuple(ignore))
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.network = GraphActorCritic(self.options)
        self._cached = EmbeddingCache(self.network)
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **options)

    def forward(
        self, obs: Any, deterministic: bool = False, action_masks: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        distribution, values = self._decide(obs, action_masks)
        actions = _choose(distribution, deterministic)
        return actions, values, distribution.log_prob(actions)

    def _predict(self, observation: Any, deterministic: bool = False, action_masks: np.ndarray | None = None) -> Tensor:
        return _choose(self.get_distribution(observation, action_masks), deterministic)

    def evaluate_actions(
        self, obs: Any, actions: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        distribution, values = self._decide(obs, action_masks)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any, action_masks: np.ndarray | None = None) -> MaskableDistribution:
        return self._decide(obs, action_masks)[0]

    def predict_values(self, obs: Any) -> Tensor:
        return self._evaluate(obs)[1]

    def _evaluate(self, obs: Any) -> tuple[Tensor, Tensor]:
        alone = torch.is_grad_enabled() or "graph" in obs  # learning, or what shares its embeddings already
        return self.network(obs) if alone else self._cached(obs)

    def _decide(self, obs: Any, action_masks: Any) -> tuple[MaskableDistribution, Tensor]:
        logits, values = self._evaluate(obs)
        distribution = self.action_dist.proba_distribution(action_logits=logits)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution, values

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **asdict(self.options)}


def _choose(distribution: MaskableDistribution, deterministic: bool) -> Tensor:
    """Actions; without chance, stop where that is likelier than to go on, and else the likeliest neuron."""
    if not deterministic:
        return distribution.get_actions(deterministic=False)
    categorical = distribution.distribution
    assert isinstance(categorical, Categorical)
    chances = categorical.probs
    return torch.where(chances[:, -1] > 0.5, chances.shape[1] - 1, chances[:, :-1].argmax(1))
