"""One network being repaired: what is pruned, the guard of the accuracy, figures and history. There is no Gymnasium in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from numbers import Integral

import numpy as np

from ..analysis.trigger_inversion import InvertedTrigger
from ..arguments import check_kind, check_whole
from ..errors import DataError, check_name
from ..wording import shown
from .defender import Defender
from .masked_model import SCORE_SAMPLES, Figures, MaskedModel
from .prepared_model import MaskGradients, PreparedModel

#: Slack in comparing accuracies, which are shares of a few hundred images.
TOLERANCE = 1e-9

#: Undone prunes that end a whole repair: under the guard "held-out" many of the best ones are.
MOST_FAILURES = 15
#: Guards of the accuracy.
COUNT, HELD_OUT = "count", "held-out"
GUARDS = (COUNT, HELD_OUT)

Units = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Transition:
    """A prune that keeps the accuracy budget, before it is settled.

    Attributes:
        prepared: the model it happens in.
        unit: what is pruned.
        before: figures before the prune.
        after: figures after it.
    """

    prepared: PreparedModel
    unit: int
    before: Figures
    after: Figures


#: What a prune is worth. One that raises an error leaves everything as it was.
Worth = Callable[[Transition], float]


@dataclass(frozen=True)
class Attempt:
    """What came of an attempt to prune a unit; nothing, where it was no open one.

    Attributes:
        pruned: whether it is pruned now.
        undone: whether it was pruned and undone, as it broke the accuracy budget.
        worth: of the prune, 0 if there was none.
    """

    pruned: bool = False
    undone: bool = False
    worth: float = 0.0


@dataclass(frozen=True)
class RepairState:
    """Where a repair is. Arrays are read-only.

    Attributes:
        history: figures of the whole network, then those after each change.
        gradients: derivatives by the mask, as they were when ``gradients_taken`` units were pruned.
        gradients_taken: number of them.
        pruned: bool (units,).
        tried: pruned and undone, bool (units,).
        over_budget: units whose prune was seen to break the budget, bool (units,).
        failures: how many prunes were undone.
        changes: what was done, in order: the unit, and whether it was restored instead of pruned.
    """

    history: tuple[Figures, ...]
    gradients: MaskGradients
    pruned: np.ndarray
    tried: np.ndarray
    over_budget: np.ndarray
    gradients_taken: int = 0
    failures: int = 0
    changes: tuple[tuple[int, bool], ...] = ()


class RepairSession:
    """One network being repaired. A *unit* is what is pruned at a time: a neuron, or a group of coupled ones.

        try_prune(unit) --guard--> state.pruned --figures--> state.history
              |                         ^
              +-- over the budget:      | restore(unit)
                  state.tried           |
        peek(units): figures as they would be; the state stays

    Args:
        prepared: the model, made ready.
        accuracy_budget: clean accuracy that may be lost: a prune beyond it is undone. None for no guard.
        max_failures: undone prunes after which the session is ``exhausted``.
        score_samples: triggered test images that ASR and RA are measured on, and half of how many clean ones the accuracy
            on test images; 0 for none.
        gradients_every: prunes after which ``derivatives`` are taken anew.
        state: that of another session of the same model, to go on from after ``reopen``.
        guard: what a prune must not bring above the budget: "count", the accuracy lost on the clean images; or "held-out", what
            is expected to be lost on other images (``Lost.at_most``), by one half of the clean ones. Then ``peek_clean`` and
            ``derivatives`` look at the other half alone, so that what guards a prune does not choose it.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        accuracy_budget: float | None = None,
        max_failures: int = 5,
        score_samples: int = SCORE_SAMPLES,
        gradients_every: int = 4,
        state: RepairState | None = None,
        guard: str = COUNT,
    ) -> None:
        check_name("guard", guard, GUARDS)
        self.prepared = prepared
        self.guard = guard
        self.accuracy_budget = accuracy_budget
        self.max_failures = max_failures
        self.score_samples = score_samples
        self.gradients_every = gradients_every
        self._masked: MaskedModel | None = None
        if state is None:
            prepared.prepare()
            self._masked = self._begin()
            self.restart()
        else:
            self.state = state

    def reopen(self) -> None:
        """Take the memory again that ``close`` gave back, and bring the network to where the repair is.

        It is changed in the same order, so that its activations are the same to the last bit.
        """
        self.prepared.prepare()
        masked = self._masked = self._begin()
        pruned = np.zeros(len(self.prepared), dtype=bool)
        for unit, restored in self.state.changes:
            pruned[unit] = not restored
            masked.figures(pruned)
            masked.keep()

    def under(self, inverted: InvertedTrigger) -> "RepairSession":
        """This repair as it would be had that trigger been inverted: all figures are taken anew, and prunes may fail again.

        This session is closed.
        """
        self.close()
        twin = RepairSession(
            self.prepared.under(inverted),
            self.accuracy_budget,
            self.max_failures,
            self.score_samples,
            self.gradients_every,
            guard=self.guard,
        )
        pruned, history = np.zeros(len(self.prepared), dtype=bool), [twin.figures]
        for unit, restored in self.state.changes:
            pruned[unit] = not restored
            history.append(twin.masked.figures(pruned))
            twin.masked.keep()
        gradients = twin.masked.gradients(pruned) if pruned.any() else twin.state.gradients
        twin._change(
            history=tuple(history),
            gradients=gradients,
            gradients_taken=int(pruned.sum()),
            pruned=_frozen(pruned),
            tried=self.state.tried,
            over_budget=self.state.over_budget,
            changes=self.state.changes,
        )
        return twin

    def restart(self) -> None:
        """Begin again with the whole network."""
        nothing = _frozen(np.zeros(len(self.prepared), dtype=bool))
        self.masked.restart()
        figures = self.masked.figures(nothing)
        gradients = self.prepared.first_gradients if self.guard == COUNT else self.masked.gradients(nothing)
        self.state = RepairState((figures,), gradients, nothing, nothing, nothing)

    def close(self) -> None:
        """Give back memory. What the state tells stays known."""
        self._masked = None

    @property
    def is_open(self) -> bool:
        """Whether the network can be asked."""
        return self._masked is not None

    @property
    def masked(self) -> MaskedModel:
        """The network without what is pruned.

        Raises:
            DataError: the session was closed.
        """
        if self._masked is None:
            raise DataError("this repair was closed: reopen() it, or begin another one")
        return self._masked

    @property
    def pass_bytes(self) -> int:
        """Size of all values of a pass of the images that every step may look at, 0 where it is closed."""
        return 0 if self._masked is None else self._masked.pass_bytes

    @property
    def defender(self) -> Defender:
        """What a pruning rule may look at."""
        return self.prepared.defender

    @property
    def figures(self) -> Figures:
        """Of the network as it is now."""
        return self.state.history[-1]

    @property
    def initial_figures(self) -> Figures:
        """Of the whole network."""
        return self.state.history[0]

    @property
    def least_acc(self) -> float:
        """Accuracy on the clean images below which the budget is broken; 0 without one."""
        budget = self.accuracy_budget
        return 0.0 if budget is None else self.initial_figures.acc - budget - TOLERANCE

    @property
    def most_lost(self) -> float:
        """Share that may be lost; infinite without a budget."""
        return inf if self.accuracy_budget is None else self.accuracy_budget + TOLERANCE

    @property
    def open_units(self) -> np.ndarray:
        """Units that can be pruned, bool (units,)."""
        return ~(self.state.pruned | self.state.tried)

    @property
    def exhausted(self) -> bool:
        """Whether too many prunes were undone, or no unit is left to prune."""
        return self.state.failures >= self.max_failures or not self.open_units.any()

    def try_prune(self, unit: int, worth: Worth | None = None) -> Attempt:
        """Prune a unit, unless that breaks the accuracy budget; one that is pruned or tried already stays as it is.

        Raises:
            DataError: no number of a unit.
        """
        if not self.open_units[_checked([unit], len(self.prepared))[0]]:
            return Attempt()
        if not self._allows(unit):
            self._change(tried=_with(self.state.tried, [unit]), failures=self.state.failures + 1)
            return Attempt(undone=True)
        pruned = _with(self.state.pruned, [unit])
        after = self.masked.figures(pruned)
        value = 0.0 if worth is None else worth(Transition(self.prepared, unit, self.figures, after))
        self._settle(unit, False, pruned, after)
        return Attempt(True, worth=value)

    def restore(self, unit: int, worth: Worth | None = None) -> float:
        """Undo the prune of a unit. What its prune is worth now is returned, with the sign turned.

        Raises:
            DataError: that unit is not pruned, or is no number.
        """
        check_kind("unit", unit, Integral, "a whole number")
        if not 0 <= unit < len(self.prepared) or not self.state.pruned[unit]:
            raise DataError(f"unit {shown(unit)} of {self.prepared.name} cannot be restored: it is not pruned")
        left = _with(self.state.pruned, [unit], False)
        after = self.masked.figures(left)
        value = 0.0 if worth is None else worth(Transition(self.prepared, unit, after, self.figures))
        self._settle(unit, True, left, after)
        return -value

    def peek(self, units: Units, restored: Units = ()) -> Figures:
        """Figures on the clean images with these units pruned too, and those restored; without ASR and RA.

        Raises:
            DataError: these are no units.
        """
        return self.masked.figures(self._as_if(units, restored), score=False)

    def peek_clean(self, units: Units, restored: Units = ()) -> tuple[float, float] | None:
        """Accuracy and cross-entropy on the clean images then; None where that breaks the budget.

        With the guard "held-out" on those that are not held out, which the mean fall of the true label's probability must keep
        within the budget. Cheaper than ``peek``, by far where the budget is broken. Of a single unit that is remembered
        (``RepairState.over_budget``).
        """
        pruned = self._as_if(units, restored)
        masked, counts = self.masked, self.guard == COUNT
        clean = masked.clean(pruned, self.least_acc) if counts else masked.choosing(pruned, self.most_lost)
        if clean is None and len(units) == 1 and not len(restored):
            self._change(over_budget=_with(self.state.over_budget, units))
        return clean

    def peek_danger(self, units: Units, restored: Units = ()) -> float:
        """Suspected danger then, at a fraction of what ``peek`` costs."""
        return self.masked.suspected_danger(self._as_if(units, restored))

    def derivatives(self) -> MaskGradients:
        """What one more prune would do, to first order; taken anew after every ``gradients_every`` prunes."""
        count = int(self.state.pruned.sum())
        if count - self.state.gradients_taken >= self.gradients_every:
            self._change(gradients=self.masked.gradients(self.state.pruned), gradients_taken=count)
        return self.state.gradients

    def suspected_fall(self, prunes: int) -> float | None:
        """How far the suspected danger fell over the last so many changes; None where there were not as many."""
        check_whole("prunes", prunes)
        history = self.state.history
        return None if len(history) <= prunes else history[-1 - prunes].suspected_danger - history[-1].suspected_danger

    def _allows(self, unit: int) -> bool:
        """Whether the guard lets that unit be pruned."""
        if self.peek_clean([unit]) is None:
            return False
        return self.guard == COUNT or self.masked.lost(self._as_if([unit], ())).at_most <= self.most_lost

    def _begin(self) -> MaskedModel:
        return MaskedModel.begin(self.prepared, self.score_samples, self.guard == HELD_OUT)

    def _settle(self, unit: int, restored: bool, pruned: np.ndarray, figures: Figures) -> None:
        self.masked.keep()
        self._change(
            pruned=pruned,
            history=(*self.state.history, figures),
            changes=(*self.state.changes, (int(unit), restored)),
        )

    def _change(self, **changed: object) -> None:
        self.state = replace(self.state, **changed)  # type: ignore[arg-type]

    def _as_if(self, units: Units, restored: Units) -> np.ndarray:
        pruned = _with(self.state.pruned, _checked(units, len(self.prepared)))
        return _with(pruned, _checked(restored, len(self.prepared)), False) if len(restored) else pruned


def _checked(units: Units, count: int) -> np.ndarray:
    """The units as int64.

    Raises:
        DataError: they are none of a network of so many.
    """
    try:
        chosen = np.asarray(units)
    except ValueError:  # lists of lists of several lengths
        chosen = np.array(None)
    if chosen.ndim != 1 or (chosen.size and not np.issubdtype(chosen.dtype, np.integer)):
        raise DataError(f"units must be a list of whole numbers, not {shown(units)}")
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < count:
        raise DataError(f"units must be of 0 to {count - 1}, not {shown(units)}")
    return chosen.astype(np.int64)


def _with(flags: np.ndarray, units: Units, value: bool = True) -> np.ndarray:
    """A copy with the flags of these units set."""
    changed = flags.copy()
    changed[np.asarray(units, dtype=np.int64)] = value
    return _frozen(changed)


def _frozen(flags: np.ndarray) -> np.ndarray:
    flags.flags.writeable = False
    return flags
