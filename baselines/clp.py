"""CLP, channel Lipschitzness based pruning (Zheng et al., ECCV 2022, arXiv:2208.03111).

Prune, in each layer, the channels whose UCLC lies above mean + u * standard deviation of the layer (section 4.2; the
published default is u = 3 on ResNet-18). No data and no training. ``backdoor_gym.graph.uclc`` defines the bound, also
where the paper is silent: residual sums, linear layers, layers without batch normalisation.

``u="auto"`` needs clean images: it lowers u in steps of 0.1, from where nothing is pruned, for as long as clean accuracy
stays within the budget.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from backdoor_gym.envs.observation import GLOBAL_FEATURES
from backdoor_gym.errors import DataError
from backdoor_gym.graph.features import STATIC_FEATURES, standardise
from backdoor_gym.graph.uclc import uclc
from backdoor_gym.infected import check_finite
from backdoor_gym.pruning.applying import write_mask
from backdoor_gym.pruning.masked import MaskedNetwork
from backdoor_gym.pruning.neurons import find_neurons
from backdoor_gym.zoo.datasets import check_images

from .policy import Observation, Policy, ask, stop_action

U = 3.0
AUTO = "auto"
ACCURACY_BUDGET = 0.02
_UCLC = STATIC_FEATURES.index("uclc")
_STEPS_LEFT = GLOBAL_FEATURES.index("steps_left")

Threshold = float | Literal["auto"]


class CLP(Policy):
    """CLP in the environment: prune what stands out, the worst first, then stop.

    It acts on the observation alone, whose first node feature is (UCLC - layer mean) / unbiased standard deviation. With
    ``u="auto"`` it is built for its environment, which tells the clean accuracy at each threshold. To run the published
    rule as published, make the environment with ``accuracy_budget=None``.

    Args:
        u: threshold in standard deviations, or "auto".
        env: the environment, needed for "auto".
        accuracy_budget: clean accuracy that "auto" may lose.

    Raises:
        DataError: an unusable threshold, or "auto" without an environment.
    """

    def __init__(self, u: Threshold = U, env: Any = None, accuracy_budget: float = ACCURACY_BUDGET) -> None:
        check_threshold(u)
        if u == AUTO and env is None:
            raise DataError('CLP(u="auto") needs the environment it acts in: CLP("auto", env)')
        self.u = u
        self.accuracy_budget = accuracy_budget
        self._env = env
        self._chosen: dict[int, float] = {}

    def begin(self, environment: int) -> None:
        self._chosen.pop(environment, None)

    def settings(self) -> dict[str, float]:
        """The threshold that was used last in the first environment."""
        return {"u": float(self.u) if self.u != AUTO else self._chosen.get(0, float("nan"))}

    def act(self, observation: Observation, environment: int) -> int:
        threshold = self._threshold(observation, environment)
        scores = np.where(observation["action_mask"][:-1] == 1, observation["nodes"][:, _UCLC], -np.inf)
        worst = int(scores.argmax())
        return worst if scores[worst] > threshold else stop_action(observation)

    def _threshold(self, observation: Observation, environment: int) -> float:
        if self.u != AUTO:
            return float(self.u)
        fresh = observation["globals"][_STEPS_LEFT] == 1
        if environment not in self._chosen or fresh:
            scores = observation["nodes"][: int(observation["num_nodes"][0]), _UCLC]
            self._chosen[environment] = choose_threshold(
                scores,
                lambda pruned: ask(self._env, environment, "evaluate_also", np.flatnonzero(pruned)).acc,
                self.accuracy_budget,
            )
        return self._chosen[environment]


def prune(
    network: nn.Module,
    u: Threshold = U,
    inplace: bool = False,
    clean: tuple[Tensor, Tensor] | None = None,
    accuracy_budget: float = ACCURACY_BUDGET,
) -> nn.Module:
    """The network with the channels that CLP finds set to zero.

    Args:
        network: any classifier that torch.fx can trace.
        u: threshold in standard deviations, or "auto".
        inplace: whether to change the network itself instead of a copy.
        clean: images float32 (n, C, H, W) in [0, 1] and labels int64 (n,), needed for "auto".
        accuracy_budget: clean accuracy that "auto" may lose.

    Raises:
        UntraceableError: the network's neurons cannot be found.
        DataError: an unusable threshold, or "auto" without clean images.
    """
    check_threshold(u)
    check_finite(network)
    neurons = find_neurons(network)
    scores = np.concatenate([standardise(bounds).numpy() for bounds in uclc(network, neurons)])
    if u == AUTO:
        if clean is None:
            raise DataError('u="auto" needs clean images: clean=(images, labels)')
        images, labels = clean
        check_images(images, labels)
        masked = MaskedNetwork(neurons, images)

        def clean_accuracy(pruned: np.ndarray) -> float:
            return (masked.logits(~pruned).argmax(1) == labels).double().mean().item()

        u = choose_threshold(scores, clean_accuracy, accuracy_budget)
    return write_mask(network, neurons, ~(scores > u), inplace)


def choose_threshold(
    scores: np.ndarray, clean_accuracy: Callable[[np.ndarray], float], accuracy_budget: float
) -> float:
    """The lowest threshold, in steps of 0.1 and not below 0, down to which accuracy stays within the budget.

    Args:
        scores: standardised UCLC, float (neurons,).
        clean_accuracy: of the network without the given neurons, bool (neurons,).
        accuracy_budget: tolerated loss.
    """
    initial = clean_accuracy(np.zeros(len(scores), dtype=bool))
    top = int(np.ceil(10 * scores.max()))
    chosen, last = top / 10, 0
    for step in range(top, -1, -1):
        u = step / 10
        pruned = scores > u
        if pruned.sum() != last and initial - clean_accuracy(pruned) > accuracy_budget + 1e-9:
            break
        chosen, last = u, int(pruned.sum())
    return float(chosen)


def check_threshold(u: Any) -> None:
    """Raise ``DataError`` unless ``u`` is a finite number or "auto"."""
    if u != AUTO and not (isinstance(u, Real) and not isinstance(u, bool) and np.isfinite(float(u))):
        raise DataError(f'u must be a number or "auto", not {u!r}')
