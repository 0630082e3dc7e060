"""A repair that goes on under another inverted trigger."""

import numpy as np
import pytest
import torch

from backdoor_gym.analysis.label_inversion import invert_label
from backdoor_gym.errors import DataError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.metrics import danger
from backdoor_gym.session import RepairSession
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


@pytest.fixture(scope="module")
def other(infected):
    """A trigger of another label than the infected one."""
    neurons = PreparedModel(infected, Preparation()).neurons
    return invert_label(neurons, infected.clean.images, infected.clean.labels, infected.target + 1, seed=5)[0]


@pytest.fixture
def session(infected):
    """With a unit restored, one that failed, and two pruned."""
    return halfway(infected, "held-out")


def halfway(infected, guard):
    prepared = PreparedModel(infected, Preparation())
    session = RepairSession(prepared, None, score_samples=32, gradients_every=1, max_failures=1, guard=guard)
    for unit in (3, 40, 90):
        session.try_prune(unit)
    session.restore(40)
    session.accuracy_budget = -1.0  # which no prune keeps
    assert session.try_prune(7).undone
    session.accuracy_budget = 0.5
    return session


def test_what_is_pruned_and_tried_stays(session, other):
    twin, state = session.under(other), session.state
    assert np.flatnonzero(twin.state.pruned).tolist() == [3, 90]
    assert twin.state.changes == state.changes == ((3, False), (40, False), (90, False), (40, True))
    assert np.flatnonzero(twin.state.tried).tolist() == [7]
    assert np.flatnonzero(twin.state.over_budget).tolist() == [7]
    assert (twin.guard, twin.accuracy_budget, twin.max_failures) == ("held-out", 0.5, 1)
    assert (twin.score_samples, twin.gradients_every) == (32, 1)


def test_prunes_may_fail_again(session, other):
    assert session.exhausted
    twin = session.under(other)
    assert twin.state.failures == 0
    assert not twin.exhausted
    assert twin.try_prune(8).pruned


@torch.no_grad()
def test_figures_are_those_of_the_new_trigger(infected, session, other):
    before = session.state.history
    twin = session.under(other)
    assert len(twin.state.history) == len(before) == 5
    pruned = np.zeros(len(twin.prepared), dtype=bool)
    for place, (old, new) in enumerate(zip(before, twin.state.history, strict=True)):
        if place:
            unit, restored = session.state.changes[place - 1]
            pruned[unit] = not restored
        network = write_mask(infected.network, twin.prepared.neurons, ~pruned)
        assert (new.acc, new.asr, new.ra, new.test_acc) == (old.acc, old.asr, old.ra, old.test_acc)
        assert new.loss == pytest.approx(old.loss, rel=1e-4)
        assert new.suspected_danger == pytest.approx(danger(network(other.images), other.target), abs=1e-5)
        assert new.suspected_danger != pytest.approx(old.suspected_danger, abs=1e-3)


def test_derivatives_are_those_of_the_new_trigger(infected, other):
    session = halfway(infected, "count")
    old = session.derivatives()
    twin = session.under(other)
    assert twin.state.gradients_taken == 2
    whole = twin.prepared.gradients(twin.state.pruned)
    for name in ("pull", "harm", "clean_pull"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(
            getattr(twin.derivatives(), name), expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max()
        )
    assert not np.allclose(twin.derivatives().pull, old.pull)


def test_without_prunes_the_derivatives_are_those_of_the_whole_network(infected, other):
    prepared = PreparedModel(infected, Preparation())
    twin = RepairSession(prepared, score_samples=0).under(other)
    assert twin.state.gradients is twin.prepared.first_gradients
    assert not np.allclose(twin.state.gradients.pull, prepared.first_gradients.pull)
    assert len(twin.state.history) == 1


def test_the_session_before_is_closed_and_its_model_as_it_was(session, other):
    prepared, own = session.prepared, session.prepared.inverted
    twin = session.under(other)
    assert (session.is_open, twin.is_open) == (False, True)
    with pytest.raises(DataError, match="closed"):
        session.try_prune(1)
    assert prepared.inverted is own
    assert twin.prepared.inverted is other
    assert twin.prepared is not prepared
    assert twin.prepared.evidence is prepared.evidence


def test_static_features_stay(session, other):
    twin = session.under(other)
    assert twin.prepared.features is session.prepared.features
    assert twin.prepared.graph is session.prepared.graph
    assert twin.prepared.clean is session.prepared.clean


def test_it_can_be_reopened_and_go_under_a_third(session, other):
    twin = session.under(other)
    figures = twin.figures
    twin.close()
    twin.reopen()
    assert twin.masked.figures(twin.state.pruned) == figures
    again = twin.under(session.prepared.inverted)
    assert again.state.changes == twin.state.changes
    assert again.figures.suspected_danger == pytest.approx(session.figures.suspected_danger, abs=1e-5)
