"""What ONP is compared with beside the published rules: rankings, a ridge regression on the same models, and greedy searches."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F
from training import ATTACKS, LOOK, POLICIES, TRAINING, attacks_of, fit_ridge, guide

from backdoor_gym.agents import ONP, LookAhead, ScoringPolicy
from backdoor_gym.agents.finetuning import learn_alone
from backdoor_gym.agents.training import checkpoint_of
from backdoor_gym.agents.warm_start import benefits
from backdoor_gym.attacks.targets import target_labels
from backdoor_gym.baselines import Ridge
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.reward import accuracy_reward
from backdoor_gym.masking.masked import MaskedNetwork
from backdoor_gym.metrics import accuracy, danger, der
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import PreparedModel
from backdoor_gym.session.session import Transition

FITS = Path(__file__).parent / "results" / "onp_ridge.json"
#: Neurons that a greedy search tries, those whose derivatives promise most; prunes that it makes; prunes without gain that end it.
CANDIDATES, STEPS, PATIENCE = 60, 100, 15
#: Steps of learning on one network alone, from nothing and from the policy that comes with the package.
ALONE, TUNED = 512, 256


@dataclass(frozen=True)
class Column:
    """Scores each unit by one node feature alone, and never stops of its own."""

    name: str

    def scores(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of one observation or a batch, float32 (n, N + 1)."""
        sign = -1 if self.name == "log_variance_ratio" else 1
        column = sign * observation["nodes"][..., NODE_FEATURES.index(self.name)]
        return np.pad(column.reshape(-1, column.shape[-1]), ((0, 0), (0, 1)), constant_values=-np.inf)


def by_column(env: Any, name: str) -> ScoringPolicy:
    """By one feature alone."""
    return ScoringPolicy(Column(name), env)


def by_ridge(env: Any, left_out: str | None = None, look_ahead: LookAhead | None = None) -> ScoringPolicy:
    """By a ridge regression of the first-order benefit of each prune, fitted on models without one attack."""
    return ScoringPolicy(fits()[str(left_out)], env, look_ahead=look_ahead)


@cache
def fits() -> dict[str, Ridge]:
    """The ridge regressions, on all training models and on those without one attack; made once."""
    if not FITS.is_file():
        school, attack_of = dict(zip(TRAINING, guide(), strict=True)), attacks_of(TRAINING)
        made = {
            str(left_out): asdict(
                fit_ridge([example for name, example in school.items() if attack_of[name] != left_out])
            )
            for left_out in (None, *ATTACKS)
        }
        FITS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    fitted = json.loads(FITS.read_text(encoding="utf-8"))
    return {key: Ridge(tuple(fit["coefficients"]), fit["intercept"]) for key, fit in fitted.items()}


class GreedyReward:
    """The prune of the largest default reward, while there is one above its cost."""

    def __init__(self, env: BackdoorPruneEnv) -> None:
        self.env = env

    def predict(self, observation: dict[str, np.ndarray], *_: Any, **__: Any) -> tuple[int, None]:
        env, prepared = self.env, self.env.session.prepared
        gradients = prepared.gradients(env.session.state.pruned)
        pull, harm = gradients.pull, gradients.harm
        promise = pull / max(pull.std(), 1e-12) - np.maximum(harm, 0) / max(harm.std(), 1e-12)
        legal = env.action_masks()[:-1][: len(prepared)]
        best, action = env.step_cost, env.stop_action
        for unit in np.argsort(-np.where(legal, promise, -np.inf))[: min(CANDIDATES, int(legal.sum()))]:
            after = env.session.peek([int(unit)])
            if observation["globals"][0] + observation["globals"][1] - after.acc > env.accuracy_budget + 1e-6:
                continue
            reward = accuracy_reward(Transition(prepared, int(unit), env.session.figures, after))
            if reward > best:
                best, action = reward, int(unit)
        return action, None


class GreedyReference:
    """Prunes what a greedy search on the true test ACC and danger finds, within the budget on the clean images.

    It knows the trigger and the test images: a reference of what pruning one neuron after the other can reach, not a bound.
    """

    def __init__(self, env: BackdoorPruneEnv) -> None:
        self.actions = [*greedy_path(env.session.prepared, env.accuracy_budget or 0.0), env.stop_action]

    def predict(self, *_: Any, **__: Any) -> tuple[int, None]:
        return self.actions.pop(0), None


def greedy_path(prepared: PreparedModel, accuracy_budget: float) -> list[int]:
    """The units up to the best DER on the way."""
    model = prepared.model
    assert model.test is not None
    assert model.trigger is not None
    assert model.target is not None
    labels = target_labels(model.test.labels, model.target, model.num_classes)
    others = model.test.labels != labels
    clean = MaskedNetwork(prepared.neurons, model.test.images)
    triggered = MaskedNetwork(prepared.neurons, model.trigger(model.test.images[others]))

    def look(pruned: np.ndarray) -> tuple[float, float]:
        mask = prepared.neuron_mask(pruned)
        logits = clean.logits(mask)
        value = danger(triggered.logits(mask), labels[others])
        return accuracy(logits, model.test.labels), value + 0.01 * F.cross_entropy(logits, model.test.labels).item()

    tried = np.argsort(-benefits(prepared))[:CANDIDATES]
    pruned, path, best = np.zeros(len(prepared), dtype=bool), list[int](), 0
    defender = MaskedModel(prepared, score_samples=0)
    least_acc = defender.figures(pruned).acc - accuracy_budget - 1e-9
    first_acc, first_value = look(pruned)
    best_der = der(first_acc, first_value, first_acc, first_value)
    while len(path) < STEPS and len(path) - best < PATIENCE:
        options = []
        for unit in tried[~pruned[tried]]:
            candidate = pruned.copy()
            candidate[unit] = True
            if defender.clean(candidate, least_acc) is not None:
                acc, value = look(candidate)
                options.append((value + max(0.0, first_acc - acc), int(unit)))
        if not options:
            break
        path.append(min(options)[1])
        pruned[path[-1]] = True
        for network in (clean, triggered):
            network.logits(prepared.neuron_mask(pruned))
            network.keep()
        defender.figures(pruned)
        defender.keep()
        acc, value = look(pruned)
        if (rated := der(first_acc, first_value, acc, value)) > best_der:
            best, best_der = len(path), rated
    return path[:best]


Makers = dict[str, str | Callable[[Any, int], Any]]


def rivals_of(attack: str) -> Makers:
    """What makes each policy of the tables for models of an attack, as ``benchmark`` takes it."""
    makers: Makers = {
        "random": "random",
        "CLP u=3": "clp:3",
        "CLP auto": "clp:auto",
        "rank by KL": lambda env, seed: by_column(env, "kl"),
        "rank by pull": lambda env, seed: by_column(env, "pull_now"),
        "ridge": lambda env, seed: by_ridge(env),
        "ridge, look-ahead": lambda env, seed: by_ridge(env, look_ahead=LOOK),
    }
    if attack in ATTACKS:
        makers["ridge, look-ahead, attack left out"] = lambda env, seed: by_ridge(env, attack, LOOK)
    for file in sorted(POLICIES.glob("*.safetensors")):
        name = file.stem
        if checkpoint_of(file).is_file():  # it is still being trained
            continue
        if name.startswith("without-"):
            if name == f"without-{attack}":
                makers["mlp-0, attack left out"] = str(file)
            continue
        makers[name] = str(file)
        if name in ("mlp-0", "gnn-0"):
            makers[f"{name}, no look-ahead"] = f"{file}:look_ahead=false"
    return makers


#: Learning on one network alone, and what it is compared with.
LEARNERS: Makers = {
    "CLP u=3": "clp:3",
    "CLP auto": "clp:auto",
    "random": "random",
    "greedy": lambda env, seed: GreedyReward(env),
    "ONP, untuned": "onp",
    "ONP alone": lambda env, seed: learn_alone(ONP(seed=seed), env, ALONE, warm=True),
    "ONP, tuned": f"onp:finetune={TUNED}",
}
