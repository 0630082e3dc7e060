"""A first guess for the policy: supervised learning from the derivatives of many infected networks.

1. ``benefits``: on models of ours the trigger is known, so to first order the worth of every prune is.
2. ``examples``: a repair of each model gives states, the preferred actions in them, and what is earned from them.
3. ``warm_start``: the network is fitted to these.

Half of the repairs follow the true benefits, the others what the environment shows, as the policy's own repairs will: a
policy that saw the best repairs alone does not know when a worse one is done. With ``oracle=False`` all is by what the
environment shows, for a network whose trigger is not known.
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
from backdoor_gym.session.prepared_model import PreparedModel

from .encoder import GraphActorCritic, grown
from .school import BUDGETS

#: Images that derivatives are taken on, at most.
IMAGES = 300
#: Danger below which a repair is done: about one triggered image in a hundred still gets the target there. Margins keep the
#: danger of many networks from ever falling to 0.1.
DONE = 0.16
#: Steps of a repair whose states become examples, and steps after it was done: without these only clean models would
#: show where to stop.
STATES = (0, 4, 10, 20, 35, 55)
STATES_AFTER_DONE = (0, 5, 10)
#: Discount of rewards, here and in the reinforcement that follows.
GAMMA = 0.97
#: Models and largest step size of the fit.
BATCH_SIZE, LEARNING_RATE = 8, 2e-3
_EDGES = ("edges", "edge_links")
_PULL, _HARM = (NODE_FEATURES.index(name) for name in ("pull_now", "harm_now"))


@dataclass(frozen=True)
class Example:
    """States along a repair of one network.

    Attributes:
        observation: arrays of the environment's observation without padding, (states, ...); ``edges`` and ``edge_links``
            once.
        preference: how much each action is preferred, float32 (states, n + 1), of sum 1.
        value: discounted reward from there on if the repair stops where that is best, float32 (states,).
    """

    observation: dict[str, np.ndarray]
    preference: np.ndarray
    value: np.ndarray


def benefits(prepared: PreparedModel, pruned: np.ndarray | None = None) -> np.ndarray:
    """First-order benefit of pruning each unit, float64 (units,); zeros for a clean model.

    It is the fall of the true target's margin on triggered test images, less the rise of the loss on the defender's clean
    images (which the accuracy budget is kept on), each in standard deviations over the network. ``pruned``, bool (units,),
    are pruned already.

    Raises:
        DataError: the trigger, the target or test images are not known.
    """
    if _is_clean(prepared):
        return np.zeros(len(prepared))
    trigger, target, test = prepared.model.trigger, prepared.model.target, prepared.model.test
    if trigger is None or target is None or test is None:
        raise DataError(f"the trigger, the target or test images of {prepared.name} are not known")
    images = test.first(IMAGES)
    targets = target_labels(images.labels, target, prepared.model.num_classes)
    others = images.labels != targets
    triggered, targets = trigger(images.images[others]), targets[others].to(prepared.options.device)
    clean = prepared.clean.first(IMAGES)
    labels = clean.labels.to(prepared.options.device)
    mask = prepared.neuron_mask(np.zeros(len(prepared), dtype=bool) if pruned is None else pruned)
    pull = prepared.by_mask(prepared.neurons, triggered, lambda logits: target_margin(logits, targets).mean(), mask)
    harm = -prepared.by_mask(prepared.neurons, clean.images, lambda logits: F.cross_entropy(logits, labels), mask)
    return pull / max(pull.std(), 1e-12) - np.maximum(harm, 0) / max(harm.std(), 1e-12)


def examples(
    infected: Sequence[Any],
    *,
    oracle: bool = True,
    jobs: int = 1,
    ray: str | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Example]:
    """An example of each model.

    Args:
        infected: names or models.
        oracle: whether the triggers are known.
        jobs: processes of one core each; they change nothing but the time.
        ray: address of a Ray cluster that makes the examples instead.
        progress: whether to draw a bar.
        options: of the environment; ``accuracy_budget`` replaces the ``BUDGETS`` that the models take in turn.
    """
    tasks = [
        (name, {"accuracy_budget": BUDGETS[index % len(BUDGETS)], **options}, index, oracle)
        for index, name in enumerate(infected)
    ]
    if jobs == 1 and ray is None:
        return [_example(*task) for task in bar(tasks, "examples", len(tasks), progress)]
    with workers(jobs, ray) as pool:
        return list(bar(pool.map(_example, *zip(*tasks, strict=True)), "examples", len(tasks), progress))


def _example(name: Any, options: dict[str, Any], index: int, oracle: bool) -> Example:
    """The example of one repair, which goes on for a while after it is done; noise by ``index`` makes it differ from the best."""
    env = BackdoorPruneEnv([name], reward="oracle" if oracle else "acc", **options)
    observation, _ = env.reset(seed=0)
    prepared, count = env.session.prepared, len(env.session.prepared)
    random = np.random.default_rng([0, index])
    noise = random.gumbel(size=count)
    order = benefits(prepared) + noise if oracle and random.random() < 0.5 else None
    edges = int(observation["num_edges"][0])
    states: list[dict[str, np.ndarray]] = []
    preferences: list[np.ndarray] = []
    steps: list[int] = []
    rewards: list[float] = []
    done_at = None
    for step in range(max(STATES) + 1):
        legal = env.action_masks()[:count]
        if not legal.any():
            break
        if done_at is None and _is_done(env, oracle):
            done_at = step
        if step in STATES or (done_at is not None and step - done_at in STATES_AFTER_DONE):
            steps.append(step)
            states.append({key: observation[key] for key in ("num_nodes", "globals")})
            states[-1]["nodes"] = observation["nodes"][:count]
            preferences.append(_preference(env, observation, legal, oracle))
        if done_at is not None and step - done_at == max(STATES_AFTER_DONE):
            break
        worth = _seen_benefits(observation)[:count] + noise if order is None else order
        observation, reward, terminated, truncated, _ = env.step(int(np.where(legal, worth, -np.inf).argmax()))
        rewards.append(float(reward))
        if terminated or truncated:
            break
    stacked = {key: np.stack([state[key] for state in states]) for key in states[0]}
    return Example(
        stacked | {key: observation[key][:edges] for key in _EDGES},
        np.stack(preferences).astype(np.float32),
        _values(rewards)[steps].astype(np.float32),
    )


def _preference(
    env: BackdoorPruneEnv, observation: Mapping[str, np.ndarray], legal: np.ndarray, oracle: bool
) -> np.ndarray:
    """To stop where the repair is done, else softmax of the benefits of the legal units, float64 (units + 1,)."""
    preference = np.zeros(len(legal) + 1)
    if _is_done(env, oracle):
        preference[-1] = 1
    else:
        worth = (
            benefits(env.session.prepared, env.session.state.pruned)
            if oracle
            else _seen_benefits(observation)[: len(legal)]
        )
        worth = np.where(legal, worth, -np.inf)
        preference[:-1] = np.exp(worth - worth.max())
        preference /= preference.sum()
    return preference


def _seen_benefits(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """The benefits by the inverted trigger instead of the true one: what the environment shows."""
    nodes = observation["nodes"]
    return nodes[:, _PULL] - np.maximum(nodes[:, _HARM], 0)


def _is_done(env: BackdoorPruneEnv, oracle: bool) -> bool:
    """Whether there is no backdoor, or no longer: by the true danger, or by the suspected one."""
    danger = env.session.figures.danger if oracle else env.session.figures.suspected_danger
    return (oracle and _is_clean(env.session.prepared)) or (danger is not None and danger < DONE)


def _is_clean(prepared: PreparedModel) -> bool:
    return prepared.model.facts.get("attack") == "clean"


def _values(rewards: Sequence[float]) -> np.ndarray:
    """``Example.value`` before each step and after the last, float64 (steps + 1,)."""
    values = np.zeros(len(rewards) + 1)
    for step in reversed(range(len(rewards))):
        values[step] = max(0.0, rewards[step] + GAMMA * values[step + 1])
    return values


def warm_start(
    network: GraphActorCritic,
    school: Sequence[Example],
    epochs: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Fit the policy to the preferences by cross-entropy, and the value by squares; the mean cross-entropy of each epoch.

    Without the value, reinforcement would begin with noise. ``progress`` draws a bar.
    """
    network.train()
    random = np.random.default_rng(seed)
    batches = -(-len(school) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    losses = []
    for _ in bar(range(epochs), "warm start", epochs, progress):
        total = 0.0
        for chosen in np.array_split(random.permutation(len(school)), batches):
            batch = [school[index] for index in chosen]
            observation, preference = padded(batch)
            logits, values = network(observation)
            loss = -(preference * torch.log_softmax(logits, 1).clamp(min=-30)).sum(1).mean()
            earned = torch.from_numpy(np.concatenate([example.value for example in batch]))
            optimizer.zero_grad()
            (loss + F.mse_loss(values.squeeze(1), earned)).backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(school))
    return losses


def padded(batch: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
    """Examples as one batch of observations that share graphs, for ``GraphActorCritic``, and their preferences."""
    most = max(example.observation["nodes"].shape[1] for example in batch)
    edges = max(len(example.observation["edges"]) for example in batch)
    observation = {
        "nodes": np.concatenate([grown(example.observation["nodes"], 1, most) for example in batch]),
        "num_edges": np.array([[len(example.observation["edges"])] for example in batch]),
        "graph": np.repeat(np.arange(len(batch)), [len(example.preference) for example in batch]),
    }
    for key in _EDGES:
        observation[key] = np.stack([grown(example.observation[key], 0, edges) for example in batch])
    for key in ("num_nodes", "globals"):
        observation[key] = np.concatenate([example.observation[key] for example in batch])
    units = np.concatenate([grown(example.preference[:, :-1], 1, most) for example in batch])
    stop = np.concatenate([example.preference[:, -1:] for example in batch])
    preference = torch.from_numpy(np.hstack([units, stop]))
    return {key: torch.from_numpy(value) for key, value in observation.items()}, preference
