"""benchmark(): every policy on every model; what is done is on disk, and a killed run goes on where it was."""

import os
import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from ..arguments import check_kind, check_path, check_whole, is_finite
from ..devices import find_device
from ..envs.prune import BackdoorPruneEnv
from ..errors import DataError, WriteError, check_name
from ..masking.export import write_mask
from ..metrics import Metrics
from ..models.catalogue import check_complete, load_infected, resolve
from ..models.infected import InfectedModel
from ..networks.adapting import deep_copy
from ..neurons.layers import RESIDUAL_MODES
from ..on_ray.cluster import Kept
from ..processes import counter, end_of_process
from ..repairing import rating
from ..rounds import run_repair
from ..session.generator import MODEL, check_model
from ..session.session import HELD_OUT, MOST_FAILURES
from ..wording import one_line, shown
from ..writing import beside, check_place, write_text
from . import figures, tables
from .cells import Cell, CellFile, Conditions, Result, all_cells
from .memory import PeakMemory
from .resuming import run_tasks
from .specifications import OWN, Maker, Policies, make, named, own_budget

CELLS, SHEET, TABLE = "cells.jsonl", "cells.csv", "table.md"
#: All that a benchmark writes into its folder.
FILES = (CELLS, SHEET, TABLE, *figures.PICTURES)


@dataclass(frozen=True)
class Benchmark:
    """What ``benchmark`` gives back.

    Attributes:
        results: of the cells that were asked for.
        table: Markdown.
        files: what was written.
    """

    results: list[Result]
    table: str
    files: list[Path]

    @property
    def failed(self) -> list[Result]:
        """Those where something went wrong."""
        return [result for result in self.results if result.error]


def benchmark(
    infected: str | Path | InfectedModel | Sequence[str | Path | InfectedModel],
    policies: Policies = ("onp", "clp", "bnp", "random"),
    budgets: Sequence[float | None] = (OWN, 0.01, 0.02, 0.05),
    *,
    seeds: int = 1,
    out: str | Path = "benchmark",
    most: int | None = None,
    jobs: int | None = None,
    clean_samples: int | None = None,
    test_samples: int | None = None,
    max_steps: int = 100,
    max_failures: int = MOST_FAILURES,
    residual: str = "channel",
    data: str | None = None,
    device: str = "cpu",
    ray: str | None = None,
    progress: bool = False,
) -> Benchmark:
    """Run every policy on every model, and write all cells, a table and figures into a folder.

    A cell that failed is kept with its error, does not stop the others, and is run again by the next call. Several processes
    need importable factories, and ``if __name__ == "__main__":`` around the call in a script.

    Args:
        infected: names, patterns or files of infected models, or models of your own, whose ``name`` stands in the tables.
        policies: specifications ``NAME[:THRESHOLD][:OPTION=VALUE]`` (``clp``, ``bnp:auto``, ``anp:0.8``, ``anp:steps=500``;
            options are those of ``repair``), policy files, or ``package.module:factory``; or a mapping from a row's name to
            one of these or to a factory, which takes the environment and a seed and gives an object with ``predict``.
        budgets: accuracy that may be lost on the defender's images, shares; ``OWN`` (None) for each policy as published.
        seeds: how many of policies that a seed changes.
        out: folder; what it holds already is not run again.
        most: only the first so many models of each pattern.
        jobs: processes of one core each, which take one model after the other; None for one a processor, 1 for this process.
        clean_samples: how many of the defender's clean images are used, None for all.
        test_samples: how many test images are scored on, None for all.
        max_steps: most prunes under a budget, tried ones counted; a policy as published has no such end.
        max_failures: undone prunes that end a repair.
        residual: "channel", or "group" to prune neurons that share a residual sum together.
        data: data set to read the images of files from, instead of the one they name.
        device: where networks run.
        ray: address of a Ray cluster that runs the cells instead of ``jobs`` processes: HOST:PORT, "auto" or "local". Its
            machines need this package, and the files of ``infected`` and ``policies`` under the same paths; the results come
            to ``out`` here. What a machine has not finished when it dies, others do.
        progress: whether to show a bar.

    Raises:
        UnknownNameError: no such policy or model.
        DataError: an unusable argument, a file in ``out`` that is not of a benchmark, or no cluster.
        WriteError: ``out`` cannot be written; finished cells are kept.

    Examples:
        >>> from backdoor_gym import benchmark
        >>> done = benchmark("digits-badnets", ["clp", "bnp"], [None], out="table", jobs=1)
        >>> [(result.policy, result.pruned, round(result.der, 3)) for result in done.results]
        [('clp', 7, 0.5), ('bnp', 12, 0.971)]
    """
    if not isinstance(budgets, Sequence) or isinstance(budgets, str):
        raise DataError(f"budgets must be a list of shares, not {shown(budgets)}")
    for budget in budgets:
        if budget is not OWN and not (is_finite(budget) and 0 <= budget <= 1):
            raise DataError(
                f"a budget must be a share from 0 to 1, or None for a policy as published, not {shown(budget)}"
            )
    makers = named(policies, budgets)
    if not budgets:
        raise DataError("a benchmark needs at least one budget")
    for what, count in {"seeds": seeds, "max_steps": max_steps, "max_failures": max_failures}.items():
        check_whole(what, count, 1)
    samples = {"clean_samples": clean_samples, "test_samples": test_samples}
    for what, limit in {"jobs": jobs, **samples, "most": most}.items():
        check_whole(what, limit, 1, may_be_none=True)
    check_path("out", out)
    check_kind("ray", ray, str, "an address", may_be_none=True)
    check_name("residual mode", residual, RESIDUAL_MODES)
    find_device(device)
    given = [infected] if isinstance(infected, MODEL) or not isinstance(infected, Iterable) else list(infected)
    for item in given:
        check_model(item)
    models: dict[str, InfectedModel | None] = {}
    for item in given:
        if isinstance(item, InfectedModel):
            if models.get(item.name) is not None:
                raise DataError("models of your own need names that differ: InfectedModel.from_module(..., name=...)")
            models[item.name] = item
        else:
            models |= {name: models.get(name) for name in resolve(str(item))[:most]}
    for name, model in models.items():
        if model is None:
            check_complete(name)
    if not models:
        raise DataError("no infected model was given")
    conditions = Conditions(clean_samples, test_samples, max_steps, max_failures, residual, data, device)
    folder = Path(out)
    for name in FILES:
        check_place(folder / name)
    file = CellFile(folder / CELLS)
    digests = {name: digest(model) for name, model in models.items() if model is not None}
    asked, done = all_cells(models, makers, budgets, seeds, digests), file.done(conditions)
    missing = {name: [cell for cell in asked if cell.model == name and cell not in done] for name in models}
    work = [(cells, makers, conditions, models[name]) for name, cells in missing.items() if cells]
    jobs = jobs or os.cpu_count() or 1
    if work and (jobs > 1 or ray is not None):
        _check_importable({name: models[name] for name, cells in missing.items() if cells})
        _check_importable(makers)
    run_tasks(run_model, work, file, jobs, ray, progress, [len(cells) for cells, *_ in work], run_alone)

    # A failure after a success is that of a process that worked on where another had finished.
    latest = {result.cell: result for result in sorted(file.read(conditions), key=lambda result: not result.error)}
    results = [latest[cell] for cell in asked if cell in latest]
    table = tables.markdown(results)
    with beside(folder) as new:
        tables.write_csv(results, new / SHEET)
        write_text(new / TABLE, table)
        drawn = figures.draw(results, new)
    return Benchmark(results, table, [folder / name for name in (CELLS, SHEET, TABLE, *(path.name for path in drawn))])


@dataclass(frozen=True)
class Ready:
    """A model made ready for its cells, its figures before any repair, and how long making it ready took."""

    model: InfectedModel
    env: BackdoorPruneEnv
    before: Metrics
    seconds: float


def run_model(
    cells: list[Cell],
    makers: dict[str, Maker],
    conditions: Conditions,
    own: InfectedModel | None,
    file: CellFile | Kept,
) -> None:
    """The cells of one model, each appended to the file as soon as it is done; those that are done already are left out."""
    ready, done = None, file.done(conditions)
    for cell in cells:
        if cell in done:
            continue
        blank = _blank(cell, conditions)
        try:
            ready = ready or make_ready(cell.model if own is None else own, conditions)
            memory = PeakMemory()
            result = run_cell(blank, makers[cell.policy], ready, conditions)
            result = replace(result, peak_memory=memory.bytes())
        except WriteError:  # no other cell would fare better
            raise
        except Exception as error:  # whatever went wrong with one, the others go on
            result = replace(blank, error=f"{type(error).__name__}: {error}")
        file.add(result)


def run_alone(
    cells: list[Cell],
    makers: dict[str, Maker],
    conditions: Conditions,
    own: InfectedModel | None,
    file: CellFile,
) -> None:
    """As ``run_model``, in a process of its own; a cell during which that dies has failed, and the next process goes on.

    Raises:
        DataError: no process can begin.
    """
    done = file.done(conditions)
    left = [cell for cell in cells if cell not in done]
    while left:
        counting = _CountingFile(file.path, counter(), left)
        why = end_of_process(partial(_run_counted, left, makers, conditions, own, counting))
        if why is None:
            return
        over = counting.counter.value
        if over < 0:
            raise DataError(
                f'a process ended before it began ({why}): a script needs `if __name__ == "__main__":` around the call; or '
                "pass jobs=1"
            )
        cell, left = left[over], left[over + 1 :]
        file.add(replace(_blank(cell, conditions), error=f"its process died: {why}"))


@dataclass(frozen=True)
class _CountingFile(CellFile):
    """A file that counts, in a ``counter`` that another process may read, how many of these cells are over."""

    counter: Any
    cells: Sequence[Cell]

    def add(self, result: Result) -> None:
        super().add(result)
        self.counter.value = self.cells.index(result.cell) + 1


def _run_counted(
    cells: list[Cell],
    makers: dict[str, Maker],
    conditions: Conditions,
    own: InfectedModel | None,
    file: _CountingFile,
) -> None:
    file.counter.value = 0  # this process has begun
    run_model(cells, makers, conditions, own, file)


def _blank(cell: Cell, conditions: Conditions) -> Result:
    return Result(cell.model, cell.policy, cell.budget, cell.seed, cell.source, asdict(conditions))


def run_cell(blank: Result, maker: Maker, ready: Ready, conditions: Conditions) -> Result:
    """One repair, in the model's environment."""
    env, model, before = ready.env, ready.model, ready.before
    env.accuracy_budget = own_budget(maker) if blank.budget is OWN else blank.budget
    env.max_steps = None if blank.budget is OWN else conditions.max_steps
    memory = env.session.prepared.defender.memory  # learning that serves several budgets counts in each
    start, spared = time.perf_counter(), memory.spared
    env.reset(seed=0)
    policy = make(maker, env, blank.budget, blank.seed)  # which may learn in the environment
    observation, _ = env.reset(seed=0)
    run_repair(policy, env, observation)
    seconds = time.perf_counter() - start + memory.spared - spared
    mask = env.session.prepared.neuron_mask(env.session.state.pruned)
    prepared = env.session.prepared
    repaired = write_mask(model.network, prepared.neurons, mask, fill=prepared.fill)
    after = model.evaluate(repaired.to(conditions.device))
    shares: dict[str, Any] = {f"{name}_before": value for name, value in before.as_dict().items()} | after.as_dict()
    return replace(
        blank,
        **shares,
        attack=one_line(str(model.facts.get("attack", ""))),
        architecture="" if model.architecture is None else str(model.architecture["name"]),
        neurons=len(mask),
        pruned=int((~mask).sum()),
        der=rating(before, after),
        seconds=round(ready.seconds + seconds, 4),
    )


def make_ready(given: str | InfectedModel, conditions: Conditions) -> Ready:
    """A model by name, or as it is, with an episode begun."""
    model = load_infected(given, conditions.data) if isinstance(given, str) else given
    if conditions.test_samples is not None and model.test is not None:
        model = replace(model, test=model.test.first(conditions.test_samples))
    start = time.perf_counter()
    env: Any = gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=model,
        residual=conditions.residual,
        clean_samples=conditions.clean_samples,
        max_failures=conditions.max_failures,
        score_samples=0,
        guard=HELD_OUT,
        device=conditions.device,
        disable_env_checker=True,
    ).unwrapped
    env.reset(seed=0)
    seconds = time.perf_counter() - start
    return Ready(model, env, model.evaluate(deep_copy(model.network).to(conditions.device)), seconds)


def digest(model: InfectedModel) -> str:
    """What changes with the weights or the clean images of a model."""
    summed = sha256()
    for tensor in (*model.network.state_dict().values(), model.clean.images, model.clean.labels):
        summed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return summed.hexdigest()[:12]


def _check_importable(things: Mapping[str, Any]) -> None:
    """Find out before the work which models and factories cannot be sent to another process."""
    for name, thing in things.items():
        try:
            pickle.dumps(thing)
        except Exception as error:  # pickle says it in many ways
            raise DataError(
                f"{name} cannot be sent to another process ({type(error).__name__}): its class, or the function itself, must "
                "be one of a module; or pass jobs=1"
            ) from error
