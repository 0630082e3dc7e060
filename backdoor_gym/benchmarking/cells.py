"""What a benchmark is made of: one policy on one model under one accuracy budget with one seed."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Self

import msgspec
from msgspec import Meta

from ..errors import DataError
from ..policies.registry import POLICIES, SUFFIX, check_policy, kind_of_policy, make_policy, options_of
from ..policies.thresholds import BUDGET, parse_threshold
from ..wording import shown
from ..writing import as_json, locked, telling

#: The budget of a policy that runs as it was published: its own stopping rule and its own default guard.
OWN = None
#: Those whose seed changes nothing, unless they learn on the network: a policy that was trained already acts as it does.
UNSEEDED = ("onp",)

Text = Annotated[str, Meta(max_length=100_000)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

Factory = Callable[[Any, int], Any]
Policies = Sequence[str] | Mapping[str, str | Factory]


@dataclass(frozen=True)
class Conditions:
    """What is the same for all cells.

    Attributes:
        clean_samples: how many of the defender's clean images are used, None for all.
        test_samples: how many test images are scored on, None for all.
        max_steps: most prunes, tried ones counted, under an accuracy budget; a policy as published has no such end.
        max_failures: undone prunes that end a repair.
        residual: "channel" or "group".
        data: data set to read the images of files from.
        device: where networks run.
    """

    clean_samples: int | None = None
    test_samples: int | None = None
    max_steps: int = 100
    max_failures: int = 5
    residual: str = "channel"
    data: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Cell:
    """One repair.

    Attributes:
        model: name or file.
        policy: name in the tables.
        budget: accuracy that may be lost on the defender's images, a share; ``OWN`` for the policy as published.
        seed: of the policy.
        source: what the policy is made by, and hashes of files: what changes when the cell is no longer the same.
    """

    model: str
    policy: str
    budget: float | None
    seed: int
    source: str


@dataclass(frozen=True)
class Result:
    """What a repair came to. Figures are None where they cannot be known, and all are where ``error`` says what went wrong.

    Attributes:
        model: name or file.
        policy: name.
        budget: as in ``Cell``.
        seed: of the policy.
        source: as in ``Cell``.
        conditions: the same for all cells, as a dict.
        attack: of the model, "" if not known.
        architecture: of the model, "" if not known.
        neurons: of the network.
        pruned: neurons pruned.
        acc_before: accuracy on test images, as are the others.
        asr_before: share of triggered images of other classes that get the target label.
        ra_before: share of them that get their true label.
        acc: after the repair.
        asr: after it.
        ra: after it.
        der: (max(0, fall of the ASR) - max(0, fall of the ACC) + 1) / 2.
        seconds: of the repair, with making the model ready for it and without scoring. What was done once for several cells of
            a model counts in each of them.
        peak_memory: most resident memory of the process during it in bytes, when the model was ready, without what was done
            for an earlier cell; None where the system does not tell.
        error: what went wrong, "" if nothing.
    """

    model: Text
    policy: Text
    budget: Share | None
    seed: Count
    source: Text
    conditions: dict[Text, Any]
    attack: Text = ""
    architecture: Text = ""
    neurons: Count | None = None
    pruned: Count | None = None
    acc_before: Share | None = None
    asr_before: Share | None = None
    ra_before: Share | None = None
    acc: Share | None = None
    asr: Share | None = None
    ra: Share | None = None
    der: Share | None = None
    seconds: Annotated[float, Meta(ge=0)] | None = None
    peak_memory: Count | None = None
    error: Text = ""

    @property
    def cell(self) -> Cell:
        """Which repair it is."""
        return Cell(self.model, self.policy, self.budget, self.seed, self.source)

    @property
    def acc_lost(self) -> float | None:
        """Accuracy lost on test images, a share."""
        return None if self.acc is None or self.acc_before is None else self.acc_before - self.acc

    def as_json(self) -> str:
        """One line."""
        return as_json(asdict(self))

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Of one line.

        Raises:
            DataError: it is none.
        """
        try:
            said = msgspec.json.decode(line)
            if not isinstance(said, dict) or said.keys() != {field.name for field in fields(cls)}:
                raise ValueError("other fields")
            return msgspec.convert(said, cls)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise DataError(f"not a result of a benchmark ({error}): {line[:80]!r}") from error


@dataclass(frozen=True)
class CellFile:
    """The file of results, one line each, that several processes append to.

    Attributes:
        path: of the file; it may be missing.
    """

    path: Path

    def append(self, result: Result) -> None:
        """Add one, at once, whole or not at all.

        Raises:
            WriteError: the disk is full, say; the results before it are kept.
        """
        with self.lock(), telling(self.path), self.path.open("ab+", buffering=0) as lines:
            end = _cut_unfinished(lines)  # of a process that was killed while others go on
            try:
                left = memoryview(f"{result.as_json()}\n".encode())
                while left:
                    left = left[lines.write(left) :]
                os.fsync(lines.fileno())
            except OSError:
                lines.truncate(end)
                raise

    def read(self, conditions: Conditions) -> list[Result]:
        """The results under these conditions.

        Raises:
            DataError: a line is no result.
        """
        return [result for result in self.read_all() if result.conditions == asdict(conditions)]

    def read_all(self) -> list[Result]:
        """All results.

        Raises:
            DataError: a line is no result.
        """
        with self.lock():
            lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        return [Result.from_json(line) for line in lines if line.strip()]

    def done(self, conditions: Conditions) -> set[Cell]:
        """The cells under these conditions in which nothing went wrong."""
        return {result.cell for result in self.read(conditions) if not result.error}

    def drop_unfinished(self) -> None:
        """Take away a last line that was not finished when a process was killed.

        Raises:
            DataError: the lines before it are no results, so it is not for us to change the file.
        """
        with self.lock():
            if not self.path.is_file():
                return
            text = self.path.read_bytes()
            finished = text.rfind(b"\n") + 1
            for line in text[:finished].splitlines():
                if line.strip():
                    Result.from_json(line)
            if not finished and text and not text.startswith(b'{"model"'):
                raise DataError(f"{self.path} is not of a benchmark")
            if finished < len(text):
                with self.path.open("r+b") as lines:
                    lines.truncate(finished)

    def lock(self) -> AbstractContextManager[None]:
        """For as long as the file is read or written."""
        return locked(self.path)


def _cut_unfinished(lines: BinaryIO) -> int:
    """Take away what stands after the end of the last whole line; where that is."""
    end = lines.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        lines.seek(start)
        newline = lines.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    lines.truncate(end)
    return end


def all_cells(
    models: Iterable[str],
    policies: Mapping[str, str | Factory],
    budgets: Sequence[float | None],
    seeds: int,
    digests: Mapping[str, str],
) -> list[Cell]:
    """Every cell; a policy that no seed changes has one. ``digests`` are of models that are no names."""
    return [
        Cell(model, policy, budget, seed, _source(model, made_by, digests))
        for model in models
        for policy, made_by in policies.items()
        for budget in budgets
        for seed in range(seeds if _is_seeded(made_by) else 1)
    ]


def named(policies: Policies, budgets: Sequence[float | None]) -> dict[str, str | Factory]:
    """Policies by the name that they have in the tables.

    Raises:
        UnknownNameError: no such policy.
        DataError: an unusable specification, or one that cannot be run under a budget.
    """
    if not isinstance(policies, Iterable) or isinstance(policies, str | bytes):
        raise DataError(f"policies must be a list of specifications, or a mapping, not {shown(policies)}")
    pairs = policies.items() if isinstance(policies, Mapping) else [(policy, policy) for policy in policies]
    for name, made_by in pairs:
        if not isinstance(name, str) or not (isinstance(made_by, str) or callable(made_by)):
            raise DataError(f"a policy must be a specification, or in a mapping a factory, not {shown(made_by)}")
    found: dict[str, str | Factory] = dict(pairs)
    if not found:
        raise DataError("no policy was given")
    for name, made_by in found.items():
        factory = _parse(made_by) if isinstance(made_by, str) else made_by
        if callable(factory):
            continue
        if BUDGET in factory[1].values() and OWN in budgets and own_budget(made_by) is None:
            raise DataError(f"{name} needs an accuracy budget, and as published it has none: leave that budget out")
    return found


def make(made_by: str | Factory, env: Any, budget: float | None, seed: int) -> Any:
    """The policy for an environment: of a user's factory, or of a specification ``NAME[:THRESHOLD][:OPTION=VALUE]``.

    A rule without a threshold in its specification has the published one as ``OWN``, and under a budget goes on until the
    episode ends (``Conditions``): so it is at its best there.
    """
    factory = _parse(made_by) if isinstance(made_by, str) else made_by
    if callable(factory):
        return factory(env, seed)
    name, options = factory
    threshold = POLICIES[kind_of_policy(name)].threshold
    if threshold is not None and budget is not OWN:
        options.setdefault(threshold, BUDGET)
    if "seed" in options_of(name):
        options["seed"] = seed
    return make_policy(name, env, options)


def own_budget(made_by: str | Factory) -> float | None:
    """The accuracy budget with which a policy runs as ``OWN``: that of its kind, 0.02 for a user's."""
    factory = _parse(made_by) if isinstance(made_by, str) else made_by
    return 0.02 if callable(factory) else POLICIES[kind_of_policy(factory[0])].budget


def _is_seeded(made_by: str | Factory) -> bool:
    factory = _parse(made_by) if isinstance(made_by, str) else made_by
    if callable(factory):
        return True
    kind = kind_of_policy(factory[0])
    return "seed" in options_of(kind) and (kind not in UNSEEDED or bool(factory[1].get("finetune")))


def _source(model: str, made_by: str | Factory, digests: Mapping[str, str]) -> str:
    made = made_by if isinstance(made_by, str) else _described(made_by)
    return " ".join(
        [made, *(version for version in (digests.get(model) or _version(model), _version(made)) if version)]
    )


def _described(factory: Factory) -> str:
    """The same for the same function in every process; of a partial with its arguments."""
    if isinstance(factory, partial):
        options = "".join(f" {key}={value!r}" for key, value in sorted(factory.keywords.items()))
        return f"{_described(factory.func)}{''.join(f' {one!r}' for one in factory.args)}{options}"
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}:{named.__qualname__}"


def _version(name: str) -> str:
    """What changes with what is in a file; "" for what is none."""
    return sha256(Path(name).read_bytes()).hexdigest()[:12] if Path(name).is_file() else ""


def _parse(text: str) -> tuple[str, dict[str, Any]] | Factory:
    """``NAME[:THRESHOLD][:OPTION=VALUE]``, the same of a policy file, or ``package.module:factory``."""
    name, *settings = text.split(":")
    if settings and name not in POLICIES and not name.endswith(SUFFIX):
        return _import(name, ":".join(settings))
    threshold = POLICIES[kind_of_policy(name)].threshold
    options: dict[str, Any] = {}
    for setting in settings:
        key, is_option, value = setting.rpartition("=")
        if not is_option:
            key = threshold or ""
            if threshold is None:
                raise DataError(f"{name} takes no threshold, so not {text}")
        if key == "seed":
            raise DataError(f"the seeds of {text} are those of the benchmark: leave seed= out")
        options[key] = parse_threshold(value) if key == threshold else _value(text, value)
    check_policy(name, options)
    return name, options


def _value(text: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        raise DataError(f"the options of a policy are numbers, true or false, not {value!r} as in {text}") from None


def _import(module: str, name: str) -> Factory:
    """A user's factory, from an installed module or one in the working folder."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's code, which can raise anything
        raise DataError(f"the policy {module}:{name} cannot be imported: {error}") from error
    if not callable(factory):
        raise DataError(f"{module}:{name} is no function of an environment and a seed")
    return factory
