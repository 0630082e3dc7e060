"""A whole repair in one environment: the verdict, rounds of pruning, and how it ends.

A policy prunes what a trigger needs that was inverted, and the true trigger may go other ways. So after a round the trigger
is inverted anew in the pruned network. Where a mask still gives the label that is far smaller than those of other labels were,
the next round begins with it; where none does, the signs are gone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import Env

from .analysis.evidence import VERDICT_THRESHOLD
from .analysis.label_inversion import invert_label
from .envs.prune import BackdoorPruneEnv
from .masking.export import write_mask
from .outcomes import REPAIRED, UNREPAIRABLE, UNTOUCHED
from .policies.contract import JudgingPolicy, Observation, run_episode
from .session import RepairSession

#: Most rounds of a repair.
ROUNDS = 4
#: Share of the suspected danger that may be left of it in a repaired network.
FALLEN = 0.35
#: Size of the smallest mask for the suspected label in the pruned network, over the median of all labels in the whole one,
#: from which on the signs are gone: in 15 clean networks of ``world-train`` those of 75 labels are 0.5 to 2.
GONE = 0.45


def run_repair(
    policy: Any,
    env: Env[Any, Any],
    observation: Observation,
    *,
    verdict: bool | None = None,
    take_back: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> tuple[str, float | None]:
    """Repair the network of an episode that has just begun.

    Args:
        policy: anything with ``predict``.
        env: a ``BackdoorPrune-v0``.
        observation: the first one of the episode.
        verdict: whether a network without signs of a backdoor stays as it is; None for what the policy does by itself.
        take_back: whether the prunes of a repair that ends as "unrepairable" are undone.
        on_step: called with the number of steps after each.

    Returns:
        The outcome (see ``repairing.repair``), and the probability of a backdoor, None without a verdict.
    """
    core = env.unwrapped
    assert isinstance(core, BackdoorPruneEnv)
    judges = isinstance(policy, JudgingPolicy)
    probability = None
    if judges if verdict is None else verdict:
        probability = core.session.prepared.evidence.probability
        if probability < (policy.verdict_threshold if judges else VERDICT_THRESHOLD):
            return UNTOUCHED, probability
    with _judged(policy):
        if probability is None:
            run_episode(policy, env, observation, on_step)
            return (REPAIRED if core.session.state.pruned.any() else UNTOUCHED), None
        gone = _prune(policy, core, observation, on_step)
    if gone:
        return REPAIRED, probability
    if take_back:
        for unit in np.flatnonzero(core.session.state.pruned)[::-1]:
            core.session.restore(int(unit))
    return UNREPAIRABLE, probability


@contextmanager
def _judged(policy: Any) -> Iterator[None]:
    """A policy that judges networks itself does not meanwhile: whether to prune is decided already."""
    if not isinstance(policy, JudgingPolicy):
        yield
        return
    own, policy.verdict_threshold = policy.verdict_threshold, 0.0
    try:
        yield
    finally:
        policy.verdict_threshold = own


def _prune(policy: Any, env: BackdoorPruneEnv, observation: Observation, on_step: Callable[[int], None] | None) -> bool:
    """Rounds of pruning until the signs are gone, which is returned, or do not fall."""
    for number in range(1, ROUNDS + 1):
        run_episode(policy, env, observation, on_step)
        if not _fell(env.session):
            return False
        if _look_again(env, number):
            return True
        if env.steps_left == 0:
            return False
        observation = env.observe()
    return False


def _fell(session: RepairSession) -> bool:
    """Whether enough of the suspected danger is gone, by a prune that stayed."""
    pruned = session.state.pruned
    before, after = (session.masked.leading_danger(these) for these in (np.zeros_like(pruned), pruned))
    return bool(pruned.any()) and after <= FALLEN * before


def _look_again(env: BackdoorPruneEnv, seed: int) -> bool:
    """Invert the trigger in the pruned network; True where its label is like any other, else the episode goes on under it."""
    prepared, state = env.session.prepared, env.session.state
    evidence = prepared.evidence
    if evidence.label is None or evidence.target is None or not evidence.label.points_to(evidence.target):
        return True  # masks did not tell of it before
    mask = prepared.neuron_mask(state.pruned)
    network = write_mask(prepared.model.network, prepared.neurons, mask, fill=prepared.fill).to(prepared.options.device)
    clean = prepared.clean
    trigger, sizes = invert_label(
        prepared.neurons, clean.images, clean.labels, evidence.target, lambda images: network(images.contiguous()), seed
    )
    if sizes.min().item() >= GONE * evidence.label.median:
        return True
    env.look_again(trigger)
    return False
