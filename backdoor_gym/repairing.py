"""repair(): run a pruning policy on one network, and say what it did."""

import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym

from .arguments import check_callable, check_kind
from .devices import find_device
from .envs.prune import BackdoorPruneEnv
from .errors import DataError, UnknownNameError
from .masking.export import write_mask
from .masking.fill import check_fill
from .metrics import Metrics, der
from .models.catalogue import load_infected
from .models.infected import InfectedModel
from .networks.adapting import deep_copy
from .policies.contract import PredictingPolicy
from .policies.registry import POLICIES, check_policy, kind_of_policy, make_policy
from .progress import Watch
from .rendering.drawing import Snapshot
from .reporting.result import Change, RepairResult
from .rounds import run_repair
from .session import RepairSession
from .session.session import HELD_OUT, MOST_FAILURES
from .wording import shown

DEFAULT_BUDGET: Any = object()
#: Share of a network's channels that can be pruned, below which a repair warns.
LITTLE = 0.7


def repair(
    infected: str | Path | InfectedModel,
    policy: str | PredictingPolicy = "onp",
    accuracy_budget: float | None = DEFAULT_BUDGET,
    *,
    max_steps: int | None = None,
    residual: str = "channel",
    fill: str = "zero",
    data: str | None = None,
    device: str = "cpu",
    watch: Watch | None = None,
    verdict: bool | None = None,
    take_back: bool = True,
    **options: Any,
) -> RepairResult:
    """Repair one network. The policy sees the network and the clean images; trigger and test images only score it.

    With a verdict the repair has one of three outcomes. "untouched": there is no sign of a backdoor. "repaired": neurons were
    pruned, the suspected danger fell to about a third or less, and no small mask gives the label any more. "unrepairable":
    there are signs of a backdoor, and pruning within the budget does not remove them; all that was pruned is taken back.

    Args:
        infected: a model, a name, or a file.
        policy: "onp" (the policy that comes with the package), the file of a policy that ``ONP.save`` wrote, a published
            rule ("clp", "bnp", "ep", "anp", "rnp", "fine-pruning", "magnitude", "greedy"), "ridge", "random", or any object with
            ``predict``; its ``finish(env)``, if it has one, is called when the episode is over and may give prunes back
            (``env.session.restore(unit, env.worth)``).
        accuracy_budget: clean accuracy that may be lost, or None for no guard: a prune after which one half of the clean images
            loses more, with one standard error, is undone; the other half chooses what to prune. By default 0.01 for "onp", None
            for rules with a published threshold and 0.02 for others.
        max_steps: most steps of the policy, None for as many as there are neurons.
        residual: "channel", or "group" to prune neurons that share a residual sum together.
        fill: what a pruned neuron gives: "zero", or "mean" for its mean over the clean images, which disturbs the network less
            (Evci et al., 2018); zero where the network cannot hold a constant.
        data: data set to read a file's images from, instead of the one it names.
        device: where the network runs.
        watch: called with what is being done, how much of it is done, and of how much (None where that is not known).
        verdict: whether a network without signs of a backdoor stays as it is; by default so for "onp" and "ridge", and not for
            published rules, which prune any network.
        take_back: whether a repair with a verdict that ends as "unrepairable" gives the network back as it came.
        **options: of the policy by name: ``look_ahead`` (default True), ``finetune`` (steps to learn on this network
            first, from its clean images alone; default 0) and ``seed`` for "onp"; ``u`` for "clp", ``threshold`` for the
            other rules (a number, "auto" or "budget"); ``seed`` for "anp", "rnp" and "random".

    Raises:
        UnknownNameError: unknown policy, or an option it does not have.
        DataError: an argument of a wrong type or out of range.
        BackdoorGymError: the model cannot be read or traced (see ``load_infected`` and ``find_neurons``).

    Examples:
        >>> from backdoor_gym import repair
        >>> result = repair("digits-badnets", "bnp", max_steps=2)
        >>> result.pruned
        ['layer4.0.conv1[20]', 'layer3.0.shortcut.0[11]']
    """
    policy = str(policy) if isinstance(policy, Path) else policy
    if not isinstance(policy, str) and not callable(getattr(policy, "predict", None)):
        raise DataError(f"a policy must be a name, a file, or an object with predict, not {shown(policy)}")
    check_callable("watch", watch, may_be_none=True)
    check_kind("verdict", verdict, bool, "True or False", may_be_none=True)
    check_kind("take_back", take_back, bool, "True or False")
    check_fill(fill)
    find_device(device)
    model = infected if isinstance(infected, InfectedModel) else load_infected(infected, data)
    name = policy if isinstance(policy, str) else type(policy).__name__.lower()
    if isinstance(policy, str):
        check_policy(policy, options)
    elif options:
        raise UnknownNameError(f"option of a {type(policy).__name__} that is made already", next(iter(options)), ())
    if accuracy_budget is DEFAULT_BUDGET:
        accuracy_budget = POLICIES[kind_of_policy(policy)].budget if isinstance(policy, str) else 0.02
    arguments = {
        "infected": str(infected) if isinstance(infected, str | Path) else None,
        "policy": policy if isinstance(policy, str) else None,
        "accuracy_budget": accuracy_budget,
        "max_steps": max_steps,
        "residual": residual,
        "fill": fill,
        "data": data,
        "device": device,
        "verdict": verdict,
        "take_back": take_back,
        **options,
    }
    watch = watch or (lambda what, done, total: None)
    watch("reading the neurons", 0, None)
    start = time.perf_counter()
    env = gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=model,
        accuracy_budget=accuracy_budget,
        max_steps=max_steps,
        residual=residual,
        fill=fill,
        guard=HELD_OUT,
        max_failures=MOST_FAILURES,
        score_samples=0,
        device=device,
        disable_env_checker=True,
    ).unwrapped
    assert isinstance(env, BackdoorPruneEnv)
    acting = make_policy(policy, env, options) if isinstance(policy, str) else policy
    observation, info = env.reset(seed=0)
    clean_before = info["acc"]
    outcome, probability = run_repair(
        acting,
        env,
        observation,
        verdict=verdict,
        take_back=take_back,
        on_step=lambda steps: watch("pruning: steps", steps, None),
    )
    session, prepared = env.session, env.session.prepared
    seconds = time.perf_counter() - start
    if prepared.neurons.coverage < LITTLE:
        left = ", ".join(
            f"{account.name} ({account.reason})" for account in prepared.neurons.left_out[:3] if account.channels
        )
        warnings.warn(
            f"only {prepared.neurons.coverage:.0%} of the network's channels can be pruned; a backdoor may sit in the others: "
            f"{left}",
            stacklevel=2,
        )
    mask = prepared.neuron_mask(session.state.pruned)
    network = write_mask(model.network, prepared.neurons, mask, fill=prepared.fill)
    before = model.evaluate(deep_copy(model.network).to(device), lambda *count: watch("scoring before", *count))
    after = model.evaluate(network.to(device), lambda *count: watch("scoring after", *count))
    network.cpu()
    snapshot, lost = Snapshot.of(session), session.masked.lost(session.state.pruned)
    env.close()
    return RepairResult(
        network,
        [
            prepared.neurons.names[neuron]
            for unit in dict.fromkeys(unit for unit, given_back in session.state.changes if not given_back)
            if session.state.pruned[unit]
            for neuron in prepared.units[unit]
        ],
        before,
        after,
        clean_before,
        session.figures.acc,
        rating(before, after),
        seconds,
        name,
        getattr(acting, "settings", dict)(),
        model,
        prepared.neurons,
        mask,
        snapshot,
        prepared.neuron_features,
        _course(session, snapshot),
        prepared.evidence,
        arguments,
        outcome,
        probability,
        prepared.fill,
        lost,
    )


def _course(session: RepairSession, snapshot: Snapshot) -> tuple[Change, ...]:
    """What was done to the network, step by step."""
    prepared, changes = session.prepared, session.state.changes
    names = [tuple(prepared.neurons.names[neuron] for neuron in prepared.units[unit]) for unit, _ in changes]
    return tuple(
        Change(neurons, given_back, acc, danger)
        for neurons, (_, given_back), acc, danger in zip(
            names, changes, snapshot.acc[1:], snapshot.danger[1:] or [None] * len(names), strict=True
        )
    )


def rating(before: Metrics, after: Metrics) -> float | None:
    """DER, where ACC and ASR are known."""
    if before.acc is None or before.asr is None or after.acc is None or after.asr is None:
        return None
    return der(before.acc, before.asr, after.acc, after.asr)
