"""repair(): run a pruning policy on one network, and say what it did."""

import inspect
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from torch import nn

from .arguments import check_callable, check_path
from .devices import find_device
from .envs.drawing import Snapshot, frame
from .envs.prune import BackdoorPruneEnv
from .errors import DataError, UnknownNameError
from .graph.reading import Reading
from .infected import InfectedModel
from .metrics import Metrics, der
from .policies import BUDGETS, PredictingPolicy, check_policy, finish, kind_of_policy, make_policy
from .progress import Watch
from .pruning.applying import write_mask
from .pruning.copying import taking_norms_off
from .pruning.cutting import cut_channels
from .pruning.neurons import Neurons
from .reporting import render
from .wording import shown
from .writing import as_json, beside, finite, write_text
from .zoo.adapting import deep_copy, in_own_types
from .zoo.catalogue import load_infected
from .zoo.files import STATE_DICT, write_tensors
from .zoo.preprocessing import Preprocessed, own_module

DEFAULT_BUDGET: Any = object()
#: Share of a network's channels that can be pruned, below which a repair warns.
LITTLE = 0.7
#: Files in the folder that ``RepairResult.save`` writes; the network of transformers or timm has names of its own.
WEIGHTS, FIGURES, PICTURE, PAGE = "repaired.safetensors", "pruned.json", "repair.png", "report.html"


@dataclass(frozen=True)
class Change:
    """One step of a repair.

    Attributes:
        neurons: their names; several where coupled ones go together.
        given_back: whether they came back, after the last prune; False where they were pruned.
        acc: accuracy on the defender's clean images after it.
        suspected_danger: after it (see ``metrics.danger``), None where no trigger could be inverted.
    """

    neurons: tuple[str, ...]
    given_back: bool
    acc: float
    suspected_danger: float | None


@dataclass(frozen=True)
class RepairResult:
    """What a repair did.

    Attributes:
        network: the repaired network, from images in [0, 1] to logits: the class of the original, zeros written where neurons
            were pruned. Where ``preprocess`` stands in front of it, ``module`` is the network behind.
        pruned: names of the neurons that stayed pruned, in the order in which they went.
        before: ACC, ASR and RA on test images before; None where test images or trigger are not known.
        after: the same afterwards.
        clean_acc_before: accuracy on the defender's clean images before.
        clean_acc_after: the same afterwards.
        der: defence effectiveness rating, where ACC and ASR are known.
        seconds: how long the policy took, with reading the neurons and without scoring.
        policy: name of the policy.
        settings: what the policy chose by itself, such as the threshold of CLP.
        infected: the model as it was.
        neurons: of the network.
        mask: bool (neurons,), False where pruned.
        snapshot: the network as it is drawn.
        features: static features of each neuron, standardised within its layer (``graph.features``), float32 (neurons, F).
        course: what was pruned and given back, step by step.
        reading: what the BN statistics say, the inverted trigger among it; None where there is no batch normalisation.
        arguments: what ``repair`` was called with, for doing it again; None for a model or a policy that is no name.
        verdict: probability that the network has a backdoor, as the policy judges it before it prunes; None where the
            policy gives none, or there are no BN statistics to judge by.
        suspected_target: the label that the BN statistics call, or without any the one that images get at the least
            change; None where neither tells.
    """

    network: nn.Module
    pruned: list[str]
    before: Metrics
    after: Metrics
    clean_acc_before: float
    clean_acc_after: float
    der: float | None
    seconds: float
    policy: str
    settings: dict[str, Any]
    infected: InfectedModel
    neurons: Neurons
    mask: np.ndarray
    snapshot: Snapshot
    features: np.ndarray
    course: tuple[Change, ...]
    reading: Reading | None
    arguments: dict[str, Any]
    verdict: float | None = None
    suspected_target: int | None = None

    @property
    def module(self) -> nn.Module:
        """The repaired network without what stands in front of it: the class that was given to ``from_module``.

        Its weights are of the types that they were of there. Weight norm, spectral norm and other parametrizations are taken off:
        its state dict has the plain weights, so take them off another network (``norms_off``) before that loads it.
        """
        return in_own_types(own_module(self.network), self.infected.dtypes)

    @property
    def complete(self) -> bool:
        """Whether ``save`` writes an infected model; the state dict of ``module`` alone otherwise."""
        return self.infected.architecture is not None and self.infected.checkpoint is None

    @property
    def norms_off(self) -> str:
        """Python that takes weight norm and the like off another ``network`` of the class, which then loads these weights."""
        return taking_norms_off(self.infected.module)

    @property
    def coverage(self) -> float:
        """Share of the channels of all layers with weights but the output that belong to a neuron."""
        return self.neurons.coverage

    def compact(self) -> nn.Module:
        """A smaller network with the same outputs, from which the pruned channels are cut out where shapes allow.

        Where they stay although nothing needs them, a warning names the layer that stops the cut.

        Raises:
            CompactionError: the network cannot take the clean images.
        """
        cut = cut_channels(self.infected.network, self.neurons, self.mask, self.infected.clean.images)
        for stop in cut.stops:
            warnings.warn(stop, stacklevel=2)
        if isinstance(cut.network, Preprocessed):
            cut.network.network = in_own_types(cut.network.network, self.infected.dtypes)
            return cut.network
        return in_own_types(cut.network, self.infected.dtypes)

    def report(self) -> dict[str, Any]:
        """All figures and the pruned neurons, JSON-able; None for those that are not finite."""
        figures: dict[str, Any] = {
            "infected": self.infected.name,
            "policy": self.policy,
            "settings": self.settings,
            "neurons": len(self.neurons),
            "coverage": round(self.neurons.coverage, 4),
            "left_out": [asdict(account) for account in self.neurons.left_out],
            "notes": list(self.neurons.notes),
            "pruned": self.pruned,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "der": self.der,
            "clean_acc_before": self.clean_acc_before,
            "clean_acc_after": self.clean_acc_after,
            "clean_images": len(self.infected.clean),
            "seconds": round(self.seconds, 3),
            "verdict": self.verdict,
            "suspected_target": self.suspected_target,
            "arguments": self.arguments,
            "course": [asdict(change) for change in self.course],
        }
        return finite(figures)

    def save(self, folder: str | Path, command: str | None = None) -> list[Path]:
        """Write the repaired network, ``report.html``, ``pruned.json`` and ``repair.png`` into a folder, made if needed.

        A network of a known architecture is saved as an infected model, ready for another ``repair``. One out of a folder of
        transformers or timm is saved as that folder was. Any other one, and one out of somebody's checkpoint, is saved as the
        state dict of ``module``, for its own class to load. All files are written, or none.

        Args:
            folder: where to.
            command: the command line that asked for this repair, to be told in the report.

        Raises:
            WriteError: the folder cannot be written.
        """
        from matplotlib.image import imsave

        check_path("the folder", folder)
        folder = Path(folder)
        page, picture = render(self, command), frame(self.snapshot)
        with beside(folder) as new:
            self._save_network(new)
            write_text(new / FIGURES, as_json(self.report(), indent=2) + "\n")
            imsave(new / PICTURE, picture)
            write_text(new / PAGE, page)
        return [folder / name for name in files_of(self.infected)]

    def _save_network(self, folder: Path) -> None:
        original = self.infected
        if original.layout is not None:
            original.layout.save(folder, self.module)
        elif self.complete:
            InfectedModel(
                self.network,
                original.clean,
                original.test,
                original.trigger,
                original.target,
                original.architecture,
                {**original.facts, "repaired_by": self.policy, "acc": self.after.acc, "asr": self.after.asr},
                f"{original.name}-repaired",
            ).save(folder / WEIGHTS)
        else:
            write_tensors(folder / WEIGHTS, self.module.state_dict(), {"format": STATE_DICT})


def files_of(infected: InfectedModel) -> list[str]:
    """Names of the files that a repair of this model writes."""
    network = [WEIGHTS] if infected.layout is None else list(infected.layout.files)
    return [*network, FIGURES, PICTURE, PAGE]


def repair(
    infected: str | Path | InfectedModel,
    policy: str | PredictingPolicy = "onp",
    accuracy_budget: float | None = DEFAULT_BUDGET,
    *,
    max_steps: int | None = None,
    residual: str = "channel",
    data: str | None = None,
    device: str = "cpu",
    watch: Watch | None = None,
    **options: Any,
) -> RepairResult:
    """Repair one network. The policy sees the network and the clean images; trigger and test images only score it.

    Args:
        infected: a model, a name, or a file.
        policy: "onp" (the policy that comes with the package), the file of a policy that ``ONP.save`` wrote, a published
            rule ("clp", "bnp", "ep", "anp", "rnp", "fine-pruning", "magnitude", "greedy"), "random", or any object with
            ``predict``; its ``finish(env)``, if it has one, is called when the episode is over and may give prunes back
            (``BackdoorPruneEnv.give_back``).
        accuracy_budget: clean accuracy that may be lost (a prune beyond it is undone), or None for no guard; by default
            0.01 for "onp", None for rules with a published threshold and 0.02 for others.
        max_steps: most steps of the policy, None for as many as there are neurons.
        residual: "channel", or "group" to prune neurons that share a residual sum together.
        data: data set to read a file's images from, instead of the one it names.
        device: where the network runs.
        watch: called with what is being done, how much of it is done, and of how much (None where that is not known).
        **options: of the policy by name: ``look_ahead`` (default True), ``finetune`` (steps to learn on this network
            first, from its clean images alone; default 0) and ``seed`` for "onp"; ``u`` for "clp", ``threshold`` for the
            other rules (a number, "auto" or "budget"); ``seed`` for "anp", "rnp" and "random".

    Raises:
        UnknownNameError: unknown policy, or an option it does not have.
        DataError: an argument of a wrong type or out of range.
        BackdoorGymError: the model cannot be read or traced (see ``load_infected`` and ``find_neurons``).
    """
    policy = str(policy) if isinstance(policy, Path) else policy
    if not isinstance(policy, str) and not callable(getattr(policy, "predict", None)):
        raise DataError(f"a policy must be a name, a file, or an object with predict, not {shown(policy)}")
    check_callable("watch", watch, may_be_none=True)
    find_device(device)
    model = infected if isinstance(infected, InfectedModel) else load_infected(infected, data)
    name = policy if isinstance(policy, str) else type(policy).__name__.lower()
    if isinstance(policy, str):
        check_policy(policy, options)
    elif options:
        raise UnknownNameError(f"option of a {type(policy).__name__} that is made already", next(iter(options)), ())
    if accuracy_budget is DEFAULT_BUDGET:
        accuracy_budget = BUDGETS[kind_of_policy(policy)] if isinstance(policy, str) else 0.02
    arguments = {
        "infected": str(infected) if isinstance(infected, str | Path) else None,
        "policy": policy if isinstance(policy, str) else None,
        "accuracy_budget": accuracy_budget,
        "max_steps": max_steps,
        "residual": residual,
        "data": data,
        "device": device,
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
        score_samples=0,
        device=device,
        disable_env_checker=True,
    ).unwrapped
    assert isinstance(env, BackdoorPruneEnv)
    acting = make_policy(policy, env, options) if isinstance(policy, str) else policy
    observation, info = env.reset(seed=0)
    clean_before = info["acc"]
    judge = getattr(acting, "verdict", None)
    # Where there are no BN statistics the policy has nothing to judge by.
    verdict = None if judge is None or env.victim.suspected is None else float(judge(observation))
    run_episode(acting, env, observation, lambda steps: watch("pruning: steps", steps, None))
    seconds = time.perf_counter() - start
    victim = env.victim
    if victim.neurons.coverage < LITTLE:
        left = ", ".join(f"{account.name} ({account.reason})" for account in victim.neurons.left_out[:3])
        warnings.warn(
            f"only {victim.neurons.coverage:.0%} of the network's channels can be pruned; a backdoor may sit in the others: {left}",
            stacklevel=2,
        )
    mask = victim.neuron_mask(env.pruned)
    network = write_mask(model.network, victim.neurons, mask)
    before = model.evaluate(deep_copy(model.network).to(device), lambda *count: watch("scoring before", *count))
    after = model.evaluate(network.to(device), lambda *count: watch("scoring after", *count))
    network.cpu()
    snapshot = env.snapshot()
    env.close()
    suspected = victim.suspected if victim.inverted is None else victim.inverted
    return RepairResult(
        network,
        [
            victim.neurons.names[neuron]
            for unit in dict.fromkeys(unit for unit, given_back in env.changes if not given_back)
            if env.pruned[unit]
            for neuron in victim.units[unit]
        ],
        before,
        after,
        clean_before,
        env.figures.acc,
        rating(before, after),
        seconds,
        name,
        getattr(acting, "settings", dict)(),
        model,
        victim.neurons,
        mask,
        snapshot,
        victim.neuron_features,
        _course(env, snapshot),
        victim.reading,
        arguments,
        verdict,
        None if suspected is None else suspected.target,
    )


def run_episode(
    policy: PredictingPolicy,
    env: BackdoorPruneEnv,
    observation: dict[str, np.ndarray],
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Let a policy act until the episode that has just begun is over, and finish; ``on_step`` is told how many steps it took."""
    takes_masks = "action_masks" in inspect.signature(policy.predict).parameters  # MaskablePPO's does
    slopes_every = env.slopes_every
    if not getattr(policy, "reads_derivatives", True):
        env.slopes_every = sys.maxsize
    state, first, done, steps = None, np.array([True]), False, 0
    try:
        while not done:
            masks = {"action_masks": env.action_masks()} if takes_masks else {}
            action, state = policy.predict(observation, state=state, episode_start=first, deterministic=True, **masks)
            observation, _, terminated, truncated, _ = env.step(int(np.asarray(action).item()))
            first, done, steps = np.array([False]), terminated or truncated, steps + 1
            if on_step is not None:
                on_step(steps)
        finish(policy, env)
    finally:
        env.slopes_every = slopes_every


def _course(env: BackdoorPruneEnv, snapshot: Snapshot) -> tuple[Change, ...]:
    """What the environment did to its network."""
    names = [tuple(env.victim.neurons.names[neuron] for neuron in env.victim.units[unit]) for unit, _ in env.changes]
    return tuple(
        Change(neurons, given_back, acc, danger)
        for neurons, (_, given_back), acc, danger in zip(
            names, env.changes, snapshot.acc[1:], snapshot.danger[1:] or [None] * len(names), strict=True
        )
    )


def rating(before: Metrics, after: Metrics) -> float | None:
    """DER, where ACC and ASR are known."""
    if before.acc is None or before.asr is None or after.acc is None or after.asr is None:
        return None
    return der(before.acc, before.asr, after.acc, after.asr)
