"""What ONP is compared with beside the published rules: a ridge regression on the same models, and two references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.nn import functional as F

from backdoor_gym.agents.warm_start import Example, benefits
from backdoor_gym.attacks.targets import target_labels
from backdoor_gym.baselines import Ridge
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.metrics import accuracy, danger, der
from backdoor_gym.session.masked_model import MaskedVictim
from backdoor_gym.session.prepared_model import Victim


@dataclass(frozen=True)
class Column:
    """Scores each unit by one node feature alone, and never stops of its own."""

    name: str

    def scores(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """As of ``agents.scoring.Scorer``."""
        nodes = observation["nodes"]
        sign = -1 if self.name == "log_variance_ratio" else 1
        scores = sign * nodes[..., NODE_FEATURES.index(self.name)].reshape(-1, nodes.shape[-2])
        return np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf)


def fit_ridge(school: Sequence[Example]) -> Ridge:
    """Fitted on what ONP's warm start is fitted on: the same states of the same models, with the same preferences."""
    return Ridge.fit(
        state for example in school for state in zip(example.observation["nodes"], example.preference, strict=True)
    )


def greedy_reference(
    victim: Victim, accuracy_budget: float, candidates: int = 60, steps: int = 100, patience: int = 15
) -> np.ndarray:
    """Pruned units, bool (units,): greedy search on the true test ACC and danger, within the budget on the clean images.

    It knows the trigger and the test images: a reference of what pruning one neuron after the other can reach, not a
    bound. Only the ``candidates`` units of the largest first-order benefit are tried, and it ends where ``patience`` prunes
    brought nothing better.
    """
    model = victim.model
    assert model.test is not None
    assert model.trigger is not None
    assert model.target is not None
    wanted = target_labels(model.test.labels, model.target, model.num_classes)
    others = model.test.labels != wanted
    clean = MaskedNetwork(victim.neurons, model.test.images)
    triggered = MaskedNetwork(victim.neurons, model.trigger(model.test.images[others]))

    def look(pruned: np.ndarray) -> tuple[float, float]:
        mask = victim.neuron_mask(pruned)
        logits = clean.logits(mask)
        value = danger(triggered.logits(mask), wanted[others])
        return accuracy(logits, model.test.labels), value + 0.01 * F.cross_entropy(logits, model.test.labels).item()

    tried = np.argsort(-benefits(victim))[:candidates]
    pruned = np.zeros(len(victim), dtype=bool)
    defender = MaskedVictim(victim, score_samples=0)
    least_acc = defender.figures(pruned).acc - accuracy_budget - 1e-9
    first_acc, now = look(pruned)
    best, best_value = pruned.copy(), der(first_acc, now, first_acc, now)
    for _ in range(steps):
        if pruned.sum() - best.sum() >= patience:
            break
        options = []
        for unit in tried:
            if pruned[unit]:
                continue
            candidate = pruned.copy()
            candidate[unit] = True
            if defender.clean(candidate, least_acc) is None:
                continue
            acc, value = look(candidate)
            options.append((value + max(0.0, first_acc - acc), int(unit)))
        if not options:
            break
        value, unit = min(options)
        pruned[unit] = True
        for network in (clean, triggered):
            network.logits(victim.neuron_mask(pruned))
            network.keep()
        defender.figures(pruned)
        defender.keep()
        acc, value = look(pruned)
        if (rated := der(first_acc, now, acc, value)) > best_value:
            best, best_value = pruned.copy(), rated
    return best
