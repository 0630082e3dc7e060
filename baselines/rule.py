"""A published pruning defence: a score of each neuron, a threshold on it, a mask."""

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from backdoor_gym.arguments import check_kind, check_real, check_whole
from backdoor_gym.data.datasets import check_images
from backdoor_gym.envs.observation import GLOBAL_FEATURES
from backdoor_gym.errors import DataError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.metrics import accuracy, require_finite
from backdoor_gym.networks.weights import check_finite
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.defender import Defender
from backdoor_gym.wording import shown

from .policy import Observation, Policy, ask, check_env, stop_action
from .thresholds import AUTO, BUDGET, Threshold, check_threshold, choose_threshold

ACCURACY_BUDGET = 0.02
_STEPS_LEFT, _BUDGET = (GLOBAL_FEATURES.index(name) for name in ("steps_left", "accuracy_budget"))


class Rule(Policy):
    """Prunes what scores above the threshold, the largest first (of equals the one nearer to the images), then stops.

    What a rule adds is ``scores``, and the threshold that its paper gives. To run it as published, make the environment
    with ``accuracy_budget=None``; with a budget each prune that breaks it is undone, and the rule goes on with the next until
    the environment ends the episode. A pruned neuron gives zero: its weight and its bias go, also where published code (of
    BNP, EP, ANP, RNP) leaves the bias of the batch normalisation.

    Args:
        env: the environment it acts in; scores come from the network and the clean images there, not the observation.
        threshold: a number; "auto" for the lowest with which accuracy on the clean images stays within
            ``accuracy_budget`` (``thresholds.choose_threshold``); "budget" for none, where the environment has an accuracy
            budget that ends the repair; None for the published one, or "auto" where none was published.
        accuracy_budget: clean accuracy that "auto" may lose.
        seed: of what is random in it.

    Raises:
        DataError: an unusable threshold, or "budget" in an environment without one.
    """

    reads_derivatives = False
    #: The published threshold, None where there is none.
    published: ClassVar[float | None] = None
    #: What the paper calls the threshold.
    symbol: ClassVar[str] = "threshold"
    #: The neurons that have a score.
    scored: ClassVar[str] = "neurons"

    def __init__(
        self,
        env: Any,
        threshold: Threshold | None = None,
        accuracy_budget: float = ACCURACY_BUDGET,
        seed: int = 0,
    ) -> None:
        check_real("accuracy_budget", accuracy_budget, 0, 1)
        check_whole("seed", seed)
        self.threshold: Threshold = self._or_published(threshold)
        self.accuracy_budget = accuracy_budget
        self.seed = seed
        self._env = env
        self._scores: dict[int, np.ndarray] = {}
        self._chosen: dict[int, float] = {}

    @abstractmethod
    def scores(self, defender: Defender) -> np.ndarray:
        """Score of each neuron, float64 (neurons,): the larger, the sooner pruned; minus infinity for never."""

    def settings(self) -> dict[str, float | str]:
        """The threshold; where it is chosen, the one of the last episode in the first environment, "all" if all may go."""
        if self.threshold != AUTO:
            return {self.symbol: self.threshold if self.threshold == BUDGET else float(self.threshold)}
        if 0 not in self._chosen:
            return {}
        return {self.symbol: self._chosen[0] if np.isfinite(self._chosen[0]) else "all"}

    def set_env(self, env: Any) -> None:
        super().set_env(env)
        self._scores.clear()

    def begin(self, environment: int) -> None:
        self._scores.pop(environment, None)

    def act(self, observation: Observation, environment: int) -> int:
        if environment not in self._scores or observation["globals"][_STEPS_LEFT] == 1:
            scores = self._unit_scores(observation, environment)
            self._chosen[environment] = self._choose(scores, observation, environment)
            self._scores[environment] = scores
        scores = self._scores[environment]
        legal = observation["action_mask"][: len(scores)] == 1
        open_scores = np.where(legal, scores, -np.inf)
        best = int(open_scores.argmax())
        return best if open_scores[best] > self._chosen[environment] else stop_action(observation)

    def __getstate__(self) -> dict[str, Any]:
        """Without the environment: it may be in another process, where the scores are then computed."""
        return {**self.__dict__, "_env": None}

    def unit_scores(self, defender: Defender) -> np.ndarray:
        """Of each unit the largest score of its neurons, float64 (units,)."""
        scores = self.scores(defender)
        return np.array([scores[unit].max() for unit in defender.units])

    def _unit_scores(self, observation: Observation, environment: int) -> np.ndarray:
        if self._env is None:
            name = type(self).__name__
            raise DataError(f"{name} needs the environment that it acts in: {name}(env)")
        check_env(self, self._env, environment, observation)
        scores: np.ndarray = ask(self._env, environment, "consult", self.unit_scores)
        return self.checked(scores)

    def checked(self, scores: np.ndarray) -> np.ndarray:
        """The scores; a network in which the rule can prune nothing is told.

        Raises:
            WeightsError: a score is NaN or infinite.
        """
        require_finite(f"a score of {type(self).__name__}", torch.from_numpy(scores[scores != -np.inf]))
        if not (scores > -np.inf).any():
            warnings.warn(
                f"{type(self).__name__} prunes {self.scored} alone, and this network has none: nothing is pruned",
                stacklevel=2,
            )
        return scores

    def _choose(self, scores: np.ndarray, observation: Observation, environment: int) -> float:
        if self.threshold == BUDGET:
            if observation["globals"][_BUDGET] >= 1:
                raise DataError(
                    'the threshold "budget" needs an accuracy budget that ends the repair, and none was given'
                )
            return -np.inf
        if self.threshold != AUTO:
            return float(self.threshold)
        check_env(self, self._env, environment, observation)
        return choose_threshold(
            scores,
            lambda pruned: ask(self._env, environment, "evaluate_also", np.flatnonzero(pruned)).acc,
            self.accuracy_budget,
        )

    @classmethod
    def prune(
        cls,
        network: nn.Module,
        clean: tuple[Tensor, Tensor],
        threshold: Threshold | None = None,
        accuracy_budget: float = ACCURACY_BUDGET,
        inplace: bool = False,
        **options: Any,
    ) -> nn.Module:
        """The network with the neurons that the rule finds set to zero, outside any environment.

        Args:
            network: any classifier that torch.fx can trace.
            clean: images float32 (n, C, H, W) in [0, 1] and labels int64 (n,).
            threshold: as for the policy, without "budget".
            accuracy_budget: clean accuracy that "auto" may lose.
            inplace: whether to change the network itself instead of a copy.
            **options: of the rule.

        Raises:
            UntraceableError: the network's neurons cannot be found.
            DataError: an unusable threshold or unusable images.
        """
        images = checked_pair(clean)[0]
        return prune_by(cls(None, threshold, accuracy_budget, **options), network, clean, inplace, images)

    @classmethod
    def _or_published(cls, threshold: Threshold | None) -> Threshold:
        if threshold is not None:
            check_threshold(threshold)
            return threshold
        if cls.published is None:
            return "auto"
        return cls.published


def checked_pair(clean: Any) -> tuple[Tensor, Tensor]:
    """Images and labels.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(clean, tuple | list) or len(clean) != 2:
        raise DataError(f"clean images must be a pair (images, labels), not {shown(clean)}")
    check_images(*clean)
    return clean[0], clean[1]


def prune_by(
    rule: Rule, network: nn.Module, clean: tuple[Tensor, Tensor], inplace: bool, traced_with: Tensor | None
) -> nn.Module:
    """The network with what a rule finds set to zero; see ``Rule.prune``, and ``find_neurons`` for ``traced_with``."""
    if rule.threshold == BUDGET:
        raise DataError('the threshold "budget" is for an environment; use "auto"')
    check_kind("the network", network, nn.Module, "a torch.nn.Module (of an InfectedModel its .network)")
    check_finite(network)
    clean = checked_pair(clean)
    neurons = find_neurons(network, traced_with)
    defender = Defender(network, neurons, neurons.units(), *clean)
    scores, threshold = rule.checked(rule.scores(defender)), rule.threshold
    if threshold == AUTO:
        masked = MaskedNetwork(neurons, clean[0], next(neurons.graph.parameters()).device)

        def clean_accuracy(pruned: np.ndarray) -> float:
            return accuracy(masked.logits(~pruned).cpu(), clean[1].cpu())

        threshold = choose_threshold(scores, clean_accuracy, rule.accuracy_budget)
    return write_mask(network, neurons, ~(scores > float(threshold)), inplace)
