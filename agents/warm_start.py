"""A first guess for the policy, before it learns from episodes: what each neuron's prune would do, to first order.

On models of ours the trigger is known, so the derivatives of the true target's margin and of the clean loss by every
neuron's mask are. The policy is fitted to prefer neurons whose loss hurts the trigger and not the clean images, to stop
once the trigger fails, and to stop at once in clean models. It meets states along one repair of each model, of half the
models by these derivatives and of the others by what the environment shows of them, as its own repairs will be: a policy
that only saw the best repairs does not know when a worse one is done. Exploring hundreds of actions from nothing would
take far more episodes. The value is fitted to what those repairs earned, or reinforcement would begin with noise.

On a network whose trigger is not known the same is done with what the environment shows alone: ``oracle=False``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoor_gym.attacks.targets import target_labels
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import DataError
from backdoor_gym.metrics import target_margin
from backdoor_gym.processes import workers
from backdoor_gym.progress import bar
from backdoor_gym.session.prepared_model import Victim

from .encoder import GraphActorCritic
from .graph_policy import OBSERVED
from .school import BUDGETS

#: Images that derivatives are taken on, at most.
IMAGES = 300
#: Danger below which a repair is done: about one triggered image in a hundred still gets the target there, and margins
#: keep the danger of many networks from ever falling to 0.1.
DONE = 0.16
#: Steps of a repair after which its state becomes an example, and those after it was done: where to stop is to be learned
#: too, and without these only clean models would show it.
STATES = (0, 4, 10, 20, 35, 55)
STATES_AFTER_DONE = (0, 5, 10)
#: Discount of rewards, here and in the reinforcement after it.
GAMMA = 0.97
_GRAPH = ("edges", "edge_links", "num_edges")
_PULL, _HARM = (NODE_FEATURES.index(name) for name in ("pull_now", "harm_now"))


@dataclass(frozen=True)
class Example:
    """States along a repair of one network, and how much each action is to be preferred in them.

    Attributes:
        observation: arrays of the environment's observation without padding, (states, ...); those of the edges once.
        preference: float32 (states, n + 1), of sum 1.
        value: float32 (states,), what is earned from there if the repair goes on and stops where that is best.
    """

    observation: dict[str, np.ndarray]
    preference: np.ndarray
    value: np.ndarray


def benefits(victim: Victim, pruned: np.ndarray | None = None) -> np.ndarray:
    """First-order benefit of pruning each unit, float64 (units,); zeros for a clean model.

    It is what the prune takes from the margin of the true target on triggered test images, less what it adds to the loss
    on the defender's clean images, each in standard deviations over the network. The loss is not that on test images:
    those would tell more of the accuracy that a prune costs, but the budget is kept on the defender's.

    Args:
        victim: the model.
        pruned: units that are pruned already, bool (units,).

    Raises:
        DataError: the trigger, the target or test images are not known.
    """
    if _is_clean(victim):
        return np.zeros(len(victim))
    trigger, target, test = victim.model.trigger, victim.model.target, victim.model.test
    if trigger is None or target is None or test is None:
        raise DataError(f"the trigger, the target or test images of {victim.name} are not known")
    some = test.first(IMAGES)
    wanted = target_labels(some.labels, target, victim.model.num_classes)
    others = some.labels != wanted
    triggered, wanted = trigger(some.images[others]), wanted[others].to(victim.options.device)
    clean = victim.clean.first(IMAGES)
    mask = victim.neuron_mask(np.zeros(len(victim), dtype=bool) if pruned is None else pruned)
    pull = victim.by_mask(victim.neurons, triggered, lambda logits: target_margin(logits, wanted).mean(), mask)
    labels = clean.labels.to(victim.options.device)
    harm = -victim.by_mask(victim.neurons, clean.images, lambda logits: F.cross_entropy(logits, labels), mask)
    return pull / max(pull.std(), 1e-12) - np.maximum(harm, 0) / max(harm.std(), 1e-12)


def examples(
    infected: Sequence[Any],
    seed: int = 0,
    *,
    oracle: bool = True,
    jobs: int = 1,
    ray: str | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Example]:
    """An example of each model: what a repair by first-order benefit meets, true in half the cases, else as it is seen.

    Args:
        infected: names or models.
        seed: of the noise that makes repairs differ from the best.
        oracle: whether the triggers are known. If not, repairs, preferences and values are by what the environment shows.
        jobs: number of processes, each of which computes on one core; with one it is this process. The examples are the
            same.
        ray: address of a Ray cluster that makes them instead.
        progress: whether to draw a bar.
        options: of the environment; ``accuracy_budget`` replaces the ``BUDGETS`` that the models take in turn.
    """
    wanted = [
        (name, {"accuracy_budget": BUDGETS[index % len(BUDGETS)], **options}, [seed, index], oracle)
        for index, name in enumerate(infected)
    ]
    if jobs == 1 and ray is None:
        return [_example(*one) for one in bar(wanted, "examples", len(wanted), progress)]
    with workers(jobs, ray) as pool:
        made = pool.map(_example, *zip(*wanted, strict=True))
        return list(bar(made, "examples", len(wanted), progress))


def _example(name: Any, options: dict[str, Any], seed: list[int], oracle: bool) -> Example:
    env = BackdoorPruneEnv([name], reward="oracle" if oracle else "acc", **options)
    random = np.random.default_rng(seed)
    observation, _ = env.reset(seed=0)
    victim = env.victim
    noise = random.gumbel(size=len(victim))
    order = benefits(victim) + noise if oracle and random.random() < 0.5 else None
    edges = int(observation["num_edges"][0])
    seen: list[dict[str, np.ndarray]] = []
    preferences: list[np.ndarray] = []
    rewards: list[float] = []
    steps: list[int] = []
    done = None
    for step in range(max(STATES) + 1):
        legal = env.action_masks()[:-1][: len(victim)]
        if not legal.any():
            break
        if done is None and _is_done(env, oracle):
            done = step
        if step in STATES or (done is not None and step - done in STATES_AFTER_DONE):
            steps.append(step)
            seen.append({key: observation[key] for key in OBSERVED if key not in _GRAPH})
            seen[-1]["nodes"] = observation["nodes"][: len(victim)]
            preferences.append(_preference(env, legal, None if oracle else _seen_benefits(observation)[: len(victim)]))
        if done is not None and step - done == max(STATES_AFTER_DONE):
            break
        worth = _seen_benefits(observation)[: len(victim)] + noise if order is None else order
        observation, reward, terminated, truncated, _ = env.step(int(np.where(legal, worth, -np.inf).argmax()))
        rewards.append(float(reward))
        if terminated or truncated:
            break
    stacked = {key: np.stack([one[key] for one in seen]) for key in seen[0]}
    graph = {"edges": observation["edges"][:edges], "edge_links": observation["edge_links"][:edges]}
    return Example(
        stacked | graph, np.stack(preferences).astype(np.float32), _values(rewards)[steps].astype(np.float32)
    )


def _values(rewards: Sequence[float]) -> np.ndarray:
    """What is earned from each step on if the repair stops where that is best, discounted, (steps + 1,)."""
    values = np.zeros(len(rewards) + 1)
    for step in reversed(range(len(rewards))):
        values[step] = max(0.0, rewards[step] + GAMMA * values[step + 1])
    return values


def _seen_benefits(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    nodes = observation["nodes"]
    return nodes[:, _PULL] - np.maximum(nodes[:, _HARM], 0)


def _is_done(env: BackdoorPruneEnv, oracle: bool) -> bool:
    """Whether there is no backdoor, or no longer: by the true danger, or by the suspected one."""
    danger = env.figures.danger if oracle else env.figures.suspected_danger
    return (oracle and _is_clean(env.victim)) or (danger is not None and danger < DONE)


def _preference(env: BackdoorPruneEnv, legal: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """By the true benefits and danger, or by benefits as they are ``seen`` and the suspected danger."""
    victim = env.victim
    preference = np.zeros(len(victim) + 1)
    if _is_done(env, oracle=seen is None):
        preference[-1] = 1
    else:
        benefit = np.where(legal, benefits(victim, env.pruned) if seen is None else seen, -np.inf)
        preference[:-1] = np.exp(benefit - benefit.max())
        preference /= preference.sum()
    return preference


def warm_start(
    network: GraphActorCritic,
    school: Sequence[Example],
    epochs: int = 50,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Fit the policy to the examples by cross-entropy, and the value by squares; the mean cross-entropy of each epoch.

    ``progress`` draws a bar.
    """
    network.train()
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    steps = epochs * -(-len(school) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    for _ in bar(range(epochs), "warm start", epochs, progress):
        total = 0.0
        for chosen in np.array_split(random.permutation(len(school)), -(-len(school) // batch_size)):
            batch = [school[index] for index in chosen]
            observation, preference = padded(batch)
            logits, values = network(observation)
            likelihood = torch.log_softmax(logits, 1)
            loss = -(preference * likelihood.clamp(min=-30)).sum(1).mean()
            earned = torch.from_numpy(np.concatenate([example.value for example in batch]))
            optimizer.zero_grad()
            (loss + F.mse_loss(values.squeeze(1), earned)).backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(school))
    return losses


def _is_clean(victim: Victim) -> bool:
    return victim.model.facts.get("attack") == "clean"


def padded(batch: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
    """Some examples as one batch of observations that share graphs, and their preferences."""
    states = [len(example.preference) for example in batch]
    most = max(example.observation["nodes"].shape[1] for example in batch)
    rows = sum(states)
    nodes = np.zeros((rows, most, batch[0].observation["nodes"].shape[2]), dtype=np.float32)
    preference = np.zeros((rows, most + 1), dtype=np.float32)
    edges = max(len(example.observation["edges"]) for example in batch)
    observation: dict[str, np.ndarray] = {}
    for key in ("edges", "edge_links"):
        first = batch[0].observation[key]
        observation[key] = np.zeros((len(batch), edges, first.shape[1]), dtype=first.dtype)
    start = 0
    for index, (example, count) in enumerate(zip(batch, states, strict=True)):
        own, end = example.observation, start + count
        nodes[start:end, : own["nodes"].shape[1]] = own["nodes"]
        preference[start:end, : own["nodes"].shape[1]] = example.preference[:, :-1]
        preference[start:end, -1] = example.preference[:, -1]
        for key in ("edges", "edge_links"):
            observation[key][index, : len(own[key])] = own[key]
        start = end
    observation |= {
        "nodes": nodes,
        "num_nodes": np.concatenate([example.observation["num_nodes"] for example in batch]),
        "globals": np.concatenate([example.observation["globals"] for example in batch]),
        "num_edges": np.array([[len(example.observation["edges"])] for example in batch]),
        "graph": np.repeat(np.arange(len(batch)), states),
    }
    return {key: torch.from_numpy(value) for key, value in observation.items()}, torch.from_numpy(preference)
