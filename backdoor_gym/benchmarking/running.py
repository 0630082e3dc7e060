"""benchmark(): every policy on every model; what is done is on disk, and a killed run goes on where it was."""

import os
import pickle
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..arguments import check_kind, check_path, check_whole, is_finite
from ..devices import find_device
from ..envs.prune import BackdoorPruneEnv
from ..errors import DataError, WriteError, check_name
from ..masking.export import write_mask
from ..metrics import Metrics
from ..models.catalogue import load_infected, resolve
from ..models.infected import InfectedModel
from ..networks.adapting import deep_copy
from ..neurons.layers import RESIDUAL_MODES
from ..on_ray.cluster import ClusterPool, Kept
from ..processes import died, workers
from ..repairing import rating, run_episode
from ..session.generator import MODEL, check_model
from ..wording import shown
from ..writing import beside, check_place, write_text
from . import figures, tables
from .cells import OWN, Cell, CellFile, Conditions, Factory, Policies, Result, all_cells, make, named, own_budget
from .memory import PeakMemory

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
    max_failures: int = 5,
    residual: str = "channel",
    data: str | None = None,
    device: str = "cpu",
    ray: str | None = None,
    progress: bool = False,
) -> Benchmark:
    """Run every policy on every model, and write all cells, a table and figures into a folder.

    A cell that failed is kept with what went wrong, does not stop the others, and is run again by the next call.

    Args:
        infected: names, patterns or files of infected models, or models of your own, whose ``name`` stands in the tables.
        policies: specifications ``NAME[:THRESHOLD][:OPTION=VALUE]`` (``clp``, ``bnp:auto``, ``anp:0.8``, ``anp:steps=500``;
            options are those of ``repair``), policy files, or ``package.module:factory``; or a mapping from a row's name to
            one of these or to a factory. A factory takes the environment and a seed and gives an object with ``predict``.
            With several processes it has to be importable, and a script that calls this function needs
            ``if __name__ == "__main__":`` around the call, as always with processes.
        budgets: accuracy that may be lost on the defender's images, shares; ``OWN`` (None) for each policy as published.
        seeds: how many of policies that a seed changes.
        out: folder; what it holds already is not run again.
        most: only the first so many models of each pattern.
        jobs: processes, each of which computes on one core and takes one model after the other; None for one a processor, 1
            for this process.
        clean_samples: how many of the defender's clean images are used, None for all.
        test_samples: how many test images are scored on, None for all.
        max_steps: most prunes under a budget, tried ones counted.
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
    counts = {
        "seeds": seeds,
        "jobs": jobs,
        "clean_samples": clean_samples,
        "test_samples": test_samples,
        "max_steps": max_steps,
        "max_failures": max_failures,
    }
    for what, count in {**counts, "most": most}.items():
        check_whole(what, count, 1, may_be_none=what not in ("seeds", "max_steps", "max_failures"))
    check_path("out", out)
    check_kind("ray", ray, str, "an address", may_be_none=True)
    check_name("residual mode", residual, RESIDUAL_MODES)
    find_device(device)
    given = [infected] if isinstance(infected, MODEL) or not isinstance(infected, Iterable) else list(infected)
    for one in given:
        check_model(one)
    own = {one.name: one for one in given if isinstance(one, InfectedModel)}
    if len(own) < sum(isinstance(one, InfectedModel) for one in given):
        raise DataError("models of your own need names that differ: InfectedModel.from_module(..., name=...)")
    names = ([one.name] if isinstance(one, InfectedModel) else resolve(str(one))[:most] for one in given)
    models = list(dict.fromkeys(name for some in names for name in some))
    if not models:
        raise DataError("no infected model was given")
    conditions = Conditions(clean_samples, test_samples, max_steps, max_failures, residual, data, device)
    folder = Path(out)
    for name in FILES:
        check_place(folder / name)
    file = CellFile(folder / CELLS)
    file.drop_unfinished()
    digests = {name: digest(one) for name, one in own.items()}
    wanted, done = all_cells(models, makers, budgets, seeds, digests), file.done(conditions)
    by_model = {model: [cell for cell in wanted if cell.model == model and cell not in done] for model in models}
    work = [(cells, makers, conditions, own.get(model)) for model, cells in by_model.items() if cells]
    _run(work, file, jobs or os.cpu_count() or 1, ray, progress)

    # A failure after a success is that of a process that worked on where another had finished.
    latest = {result.cell: result for result in sorted(file.read(conditions), key=lambda one: not one.error)}
    results = [latest[cell] for cell in wanted if cell in latest]
    table = tables.markdown(results)
    with beside(folder) as new:
        tables.write_csv(results, new / SHEET)
        write_text(new / TABLE, table)
        drawn = figures.draw(results, new)
    return Benchmark(results, table, [folder / name for name in (CELLS, SHEET, TABLE, *(path.name for path in drawn))])


Work = tuple[list[Cell], dict[str, str | Factory], Conditions, InfectedModel | None]


def _run(work: Sequence[Work], file: CellFile, jobs: int, ray: str | None, progress: bool) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("benchmark", total=sum(len(cells) for cells, *_ in work))
        if jobs == 1 and ray is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in the processes: seconds of both stand in one table
            try:
                for one in work:
                    run_model(*one, file)
                    bar.advance(task, len(one[0]))
            finally:
                torch.set_num_threads(threads)
            return
        _check_importable(work)
        with workers(jobs, ray) as pool:
            store = pool.keeper(file) if isinstance(pool, ClusterPool) else file
            waiting = {pool.submit(run_model, *one, store): one for one in work}
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.advance(task, len(waiting[done][0]))
            except Exception as error:
                if not died(error):
                    raise
                raise DataError(
                    'a process died (out of memory, or a script without `if __name__ == "__main__":`?); call again, with '
                    f"fewer jobs: finished cells are kept ({type(error).__name__})"
                ) from error


@dataclass(frozen=True)
class _Ready:
    """A model made ready for its cells, what it can before a repair, and how long making it ready took."""

    model: InfectedModel
    env: BackdoorPruneEnv
    before: Metrics
    seconds: float


def run_model(
    cells: list[Cell],
    makers: dict[str, str | Factory],
    conditions: Conditions,
    own: InfectedModel | None,
    file: CellFile | Kept,
) -> None:
    """The cells of one model, each appended to the file as soon as it is done; those that are done already are left out."""
    ready, done = None, file.done(conditions)
    for cell in (cell for cell in cells if cell not in done):
        blank = Result(cell.model, cell.policy, cell.budget, cell.seed, cell.source, asdict(conditions))
        try:
            ready = ready or _make_ready(cell.model if own is None else own, conditions)
            memory = PeakMemory()
            result = run_cell(blank, makers[cell.policy], ready, conditions)
            result = replace(result, peak_memory=memory.bytes())
        except WriteError:  # no other cell would fare better
            raise
        except Exception as error:  # whatever went wrong with one, the others go on
            result = replace(blank, error=f"{type(error).__name__}: {error}")
        file.append(result)


def run_cell(blank: Result, made_by: str | Factory, ready: _Ready, conditions: Conditions) -> Result:
    """One repair, in the model's environment."""
    env, model, before = ready.env, ready.model, ready.before
    env.accuracy_budget = own_budget(made_by) if blank.budget is OWN else blank.budget
    env.max_steps = None if blank.budget is OWN else conditions.max_steps
    memory = env.victim.defender.memory  # learning that serves several budgets counts in each
    start, spared = time.perf_counter(), memory.spared
    env.reset(seed=0)
    policy = make(made_by, env, blank.budget, blank.seed)  # which may learn in the environment
    observation, _ = env.reset(seed=0)
    run_episode(policy, env, observation)
    seconds = time.perf_counter() - start + memory.spared - spared
    mask = env.victim.neuron_mask(env.pruned)
    after = model.evaluate(write_mask(model.network, env.victim.neurons, mask).to(conditions.device))
    return replace(
        blank,
        attack=str(model.facts.get("attack", "")),
        architecture="" if model.architecture is None else str(model.architecture["name"]),
        neurons=len(mask),
        pruned=int((~mask).sum()),
        acc_before=before.acc,
        asr_before=before.asr,
        ra_before=before.ra,
        acc=after.acc,
        asr=after.asr,
        ra=after.ra,
        der=rating(before, after),
        seconds=round(ready.seconds + seconds, 4),
    )


def _make_ready(given: str | InfectedModel, conditions: Conditions) -> _Ready:
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
        device=conditions.device,
        disable_env_checker=True,
    ).unwrapped
    env.reset(seed=0)
    seconds = time.perf_counter() - start
    return _Ready(model, env, model.evaluate(deep_copy(model.network).to(conditions.device)), seconds)


def digest(model: InfectedModel) -> str:
    """What changes with the weights or the clean images of a model."""
    found = sha256()
    for tensor in (*model.network.state_dict().values(), model.clean.images, model.clean.labels):
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def _check_importable(work: Sequence[Work]) -> None:
    for *_, own in work:
        try:
            pickle.dumps(own)
        except Exception as error:
            raise DataError(
                f"{'' if own is None else own.name} cannot be sent to another process ({type(error).__name__}): its class must be "
                "one of a module; or pass jobs=1"
            ) from error
    for _, makers, *_ in work[:1]:
        for name, made_by in makers.items():
            try:
                pickle.dumps(made_by)
            except Exception as error:  # pickle says it in many ways
                raise DataError(
                    f"the factory of {name} cannot be sent to another process: make it a function of a module, or pass jobs=1"
                ) from error
