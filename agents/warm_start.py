"""A first guess for the policy, before it learns from episodes: what each neuron's prune would do, to first order.

On models of ours the trigger is known, so the derivatives of the true target's margin and of the clean loss by every
neuron's mask are. The policy is fitted to prefer neurons whose loss hurts the trigger and not the clean images, and to
stop at once in clean models. Exploring hundreds of actions from nothing would take far more episodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.victim import Victim
from backdoor_gym.errors import DataError
from backdoor_gym.metrics import target_margin

from .encoder import GraphActorCritic
from .graph_policy import OBSERVED

#: Triggered images that derivatives are taken on.
IMAGES = 100
#: Standard deviations of benefit over which the preference falls by a factor e.
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Example:
    """A whole network as it is first observed, and how much each action is to be preferred, float32 (n + 1,), sum 1."""

    observation: dict[str, np.ndarray]
    preference: np.ndarray


def benefits(victim: Victim) -> np.ndarray:
    """First-order benefit of pruning each unit, float64 (units,); zeros for a clean model.

    It is what the prune takes from the margin of the true target, less what it adds to the clean loss, each in standard
    deviations over the network.

    Raises:
        DataError: the trigger is not known.
    """
    if victim.model.facts.get("attack") == "clean":
        return np.zeros(len(victim))
    images, _ = victim.triggered
    if not len(images) or victim.model.target is None:
        raise DataError(f"the trigger of {victim.name} is not known")
    target = victim.model.target
    clean, labels = victim.clean.images[:IMAGES], victim.clean.labels[:IMAGES]
    pull = _by_mask(victim, images[:IMAGES], lambda logits: target_margin(logits, target).mean())
    harm = -_by_mask(victim, clean, lambda logits: F.cross_entropy(logits, labels))
    return pull / max(pull.std(), 1e-12) - np.maximum(harm, 0) / max(harm.std(), 1e-12)


def examples(infected: Sequence[str], **options: Any) -> list[Example]:
    """An example of each model.

    Args:
        infected: names.
        options: of the environment.
    """
    env = BackdoorPruneEnv(list(infected), **options)
    found = []
    for name in infected:
        observation, _ = env.reset(seed=0, options={"infected": name})
        victim = env.victim
        preference = np.zeros(len(victim) + 1)
        if victim.model.facts.get("attack") == "clean":
            preference[-1] = 1
        else:
            benefit = benefits(victim) / TEMPERATURE
            chances = np.exp(benefit - benefit.max())
            preference[:-1] = chances / chances.sum()
        rows = {"nodes": len(victim), "edges": len(victim.graph.edges), "edge_links": len(victim.graph.edges)}
        kept = {key: observation[key][: rows.get(key)] for key in OBSERVED}
        found.append(Example(kept, preference.astype(np.float32)))
    return found


def warm_start(
    network: GraphActorCritic,
    school: Sequence[Example],
    epochs: int = 10,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Fit the policy to the examples by cross-entropy; the mean loss of each epoch."""
    network.train()
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    steps = epochs * -(-len(school) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for chosen in np.array_split(random.permutation(len(school)), -(-len(school) // batch_size)):
            batch = [school[index] for index in chosen]
            observation, preference = _padded(batch)
            logits, _ = network(observation)
            loss = -(preference * torch.log_softmax(logits, 1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(school))
    return losses


def _by_mask(victim: Victim, images: Tensor, quantity: Any) -> np.ndarray:
    """Derivative of a quantity of the logits by the mask of each unit, float64 (units,)."""
    layers = victim.neurons.layers
    masks = [torch.ones(layer.size, requires_grad=True) for layer in layers]
    with torch.enable_grad():
        gradients = torch.autograd.grad(quantity(victim.neurons.graph(images, *masks)), masks, allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros_like(mask) if gradient is None else gradient
            for mask, gradient in zip(masks, gradients, strict=True)
        ]
    )
    values = flat.double().numpy()
    return np.array([values[unit].sum() for unit in victim.units])


def _padded(batch: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
    observation: dict[str, Tensor] = {}
    for key in OBSERVED:
        arrays = [example.observation[key] for example in batch]
        padded = np.zeros((len(batch), max(map(len, arrays)), *arrays[0].shape[1:]), dtype=arrays[0].dtype)
        for row, array in zip(padded, arrays, strict=True):
            row[: len(array)] = array
        observation[key] = torch.from_numpy(padded)
    preference = torch.zeros(len(batch), observation["nodes"].shape[1] + 1)
    for row, example in zip(preference, batch, strict=True):
        row[: len(example.preference) - 1] = torch.from_numpy(example.preference[:-1])
        row[-1] = float(example.preference[-1])
    return observation, preference
