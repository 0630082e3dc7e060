"""What a benchmark is made of: one policy on one model under one accuracy budget with one seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from ..errors import DataError
from ..files.schemas import Count
from ..session.session import MOST_FAILURES
from ..writing import as_json
from .resuming import LineFile
from .specifications import Maker, described, is_seeded, version

Text = Annotated[str, Meta(max_length=100_000)]
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Conditions:
    """What is the same for all cells: the arguments of ``benchmark`` of these names."""

    clean_samples: int | None = None
    test_samples: int | None = None
    max_steps: int = 100
    max_failures: int = MOST_FAILURES
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
        source: what makes the policy, and digests of files: with another one it is another cell.
    """

    model: Text
    policy: Text
    budget: Share | None
    seed: Count
    source: Text


@dataclass(frozen=True)
class Result(Cell):
    """A repair and what came of it. Figures that cannot be known are None; all are where ``error`` says what went wrong.

    Attributes:
        conditions: the same for all cells.
        attack: of the model, "" if not known, like ``architecture``.
        neurons: of the network, of which ``pruned`` were pruned.
        acc_before: accuracy on test images, after the repair ``acc``.
        asr_before: share of triggered images of other classes that get the target label, after the repair ``asr``.
        ra_before: share of them that get their true label, after the repair ``ra``.
        der: (max(0, fall of the ASR) - max(0, fall of the ACC) + 1) / 2.
        seconds: of making the model ready and of the repair, without scoring. What was done once for several cells of a model
            counts in each of them.
        peak_memory: most resident memory of the process during the repair in bytes, None where the system does not tell.
        error: what went wrong, "" if nothing.
    """

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
            content = msgspec.json.decode(line)
            if not isinstance(content, dict) or content.keys() != {field.name for field in fields(cls)}:
                raise ValueError("other fields")
            result = msgspec.convert(content, cls)
            if result.der is not None and None in (result.acc_lost, result.asr, result.asr_before):
                raise ValueError("a DER without the ACC and ASR that it is made of")
            return result
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise DataError(f"not a result of a benchmark ({error}): {line[:80]!r}") from error


class CellFile(LineFile):
    """The results of a benchmark, one line each."""

    begins: ClassVar[bytes] = b'{"model"'

    def add(self, result: Result) -> None:
        """Append a result."""
        self.append(result.as_json())

    def read_all(self) -> list[Result]:
        """All results.

        Raises:
            DataError: a line is no result.
        """
        return [Result.from_json(line) for line in self.lines()]

    def read(self, conditions: Conditions) -> list[Result]:
        """The results under these conditions."""
        return [result for result in self.read_all() if result.conditions == asdict(conditions)]

    def done(self, conditions: Conditions) -> set[Cell]:
        """The cells under these conditions in which nothing went wrong."""
        return {result.cell for result in self.read(conditions) if not result.error}


def all_cells(
    models: Iterable[str],
    makers: Mapping[str, Maker],
    budgets: Sequence[float | None],
    seeds: int,
    digests: Mapping[str, str],
) -> list[Cell]:
    """Every cell; a policy that no seed changes has one. ``digests`` are of models that are no names."""

    def source(model: str, maker: Maker) -> str:
        made = described(maker)
        return " ".join(filter(None, (made, digests.get(model) or version(model), version(made))))

    return [
        Cell(model, policy, budget, seed, source(model, maker))
        for model in models
        for policy, maker in makers.items()
        for budget in budgets
        for seed in range(seeds if is_seeded(maker) else 1)
    ]
