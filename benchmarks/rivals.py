"""What ONP is compared with beside the published rules: a ridge regression on the same models, and two references."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from backdoor_gym.agents import ONP, LookAhead
from backdoor_gym.agents.warm_start import Example, benefits
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.attacks.targets import target_labels
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.metrics import accuracy, danger, der
from backdoor_gym.session.masked_model import MaskedVictim
from backdoor_gym.session.prepared_model import Victim

#: What the ridge sees of a neuron: all that changes with the neuron but the flags.
COLUMNS = [NODE_FEATURES.index(name) for name in (*STATIC_FEATURES, "pull_now", "harm_now", "clean_pull_now")]


class Ranking(ONP):
    """Prunes by a score of each neuron's features, and never stops of its own; looks ahead as ONP does."""

    def __init__(self, env: Any, look_ahead: LookAhead | None = None) -> None:
        super().__init__(look_ahead=look_ahead, seed=0)
        self.env = env

    def score(self, features: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def logits(self, observation: Any) -> np.ndarray:
        scores = self.score(observation["nodes"])
        return np.append(scores, -1e6)[None].astype(np.float32)


class Column(Ranking):
    """By one feature alone."""

    def __init__(self, env: Any, name: str, **options: Any) -> None:
        super().__init__(env, **options)
        self.column, self.sign = NODE_FEATURES.index(name), -1 if name == "log_variance_ratio" else 1

    def score(self, features: np.ndarray) -> np.ndarray:
        return self.sign * features[:, self.column]


class RidgePolicy(Ranking):
    """By a ridge regression of the first-order benefit of each prune on the features of its neuron."""

    def __init__(self, env: Any, model: Ridge, **options: Any) -> None:
        super().__init__(env, **options)
        self.model = model

    def score(self, features: np.ndarray) -> np.ndarray:
        return self.model.predict(features[:, COLUMNS].astype(np.float64))


def fit_ridge(school: Sequence[Example]) -> Ridge:
    """Fitted on what ONP's warm start is fitted on: the same states of the same models, with the same labels."""
    features, labels = [], []
    for example in school:
        for nodes, preference in zip(example.observation["nodes"], example.preference, strict=True):
            legal = np.flatnonzero(preference[:-1])
            if len(legal):  # else it is a state to stop in
                benefit = np.log(preference[legal].astype(np.float64))
                features.append(nodes[legal][:, COLUMNS].astype(np.float64))
                labels.append(benefit - benefit.mean())
    return Ridge(10.0).fit(np.concatenate(features), np.concatenate(labels))


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
