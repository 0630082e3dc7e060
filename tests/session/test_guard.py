"""What is expected to be lost, and the guard that goes by it: by images that choose nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_gym import InfectedModel, benchmark, parallel_env, repair
from backdoor_gym.benchmarking import running
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import UnknownNameError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.session import RepairSession
from backdoor_gym.session.masked_model import NOTHING_LOST, STANDARD_ERRORS, Lost, every_second
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

from ..analysis.test_label_inversion import clean, templates


def doubled() -> nn.Sequential:
    """A classifier with two units a label: without one of them it answers the same, and is less sure."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
    with torch.no_grad():
        network[1].weight.copy_((templates().flatten(1) - 0.5).repeat(2, 1))
        network[1].bias.zero_()
        network[3].weight.copy_(0.3 * torch.eye(10).repeat(1, 2))
        network[3].bias.zero_()
    return network


@pytest.fixture
def prepared() -> PreparedModel:
    return PreparedModel(InfectedModel.from_module(doubled(), clean()), Preparation())


def units(prepared, *pruned) -> np.ndarray:
    flags = np.zeros(len(prepared), dtype=bool)
    flags[list(pruned)] = True
    return flags


def test_what_is_lost_is_a_mean_with_its_error():
    falls = torch.tensor([0.1, -0.2, 0.3, 0.6])
    lost = Lost.of(falls)
    assert lost.mean == pytest.approx(0.2)
    assert lost.error == pytest.approx(np.std([0.1, -0.2, 0.3, 0.6], ddof=1) / 2)
    assert lost.at_most == pytest.approx(lost.mean + STANDARD_ERRORS * lost.error)
    assert str(Lost(0.0123, 0.0046)) == "1.2 ± 0.5"


def test_a_single_image_has_no_error():
    assert Lost.of(torch.tensor([0.25])) == Lost(0.25, 0.0)


def test_nothing_is_lost_without_prunes(prepared):
    session = RepairSession(prepared)
    assert session.masked.lost(session.state.pruned) == NOTHING_LOST
    assert NOTHING_LOST.at_most == 0


def on_halves(prepared, pruned: np.ndarray):
    """Probabilities of the true labels before and after, logits after, and labels: of the half that chooses, and of the other."""
    images, labels = prepared.clean.images, prepared.clean.labels
    other = every_second(labels)
    masked = write_mask(prepared.model.network, prepared.neurons, prepared.neuron_mask(pruned), fill=prepared.fill)
    halves = []
    for half in (~other, other):
        with torch.no_grad():
            before, after = (network(images[half]) for network in (prepared.model.network, masked))
        chances = [logits.softmax(1)[range(int(half.sum())), labels[half]] for logits in (before, after)]
        halves.append((*chances, after, labels[half]))
    return halves


def test_every_second_image_of_each_label_is_held_out():
    labels = torch.randint(7, (101,), generator=torch.Generator().manual_seed(0))
    other = every_second(labels)
    assert other.sum() == 50
    assert ((labels[other].bincount(minlength=7) - labels[~other].bincount(minlength=7)).abs() <= 1).all()
    assert every_second(torch.tensor([3])).tolist() == [False]


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_what_is_lost_is_the_fall_of_the_true_label(infected, fill):
    prepared = PreparedModel(infected, Preparation(fill=fill))
    for guard in ("count", "held-out"):
        session = RepairSession(prepared, guard=guard)
        for unit in (3, 40, 41, 90):
            session.try_prune(unit)
        choosing, other = on_halves(prepared, session.state.pruned)
        halves = [other] if guard == "held-out" else [choosing, other]
        lost, expected = (
            session.masked.lost(session.state.pruned),
            Lost.of(torch.cat([before - after for before, after, *_ in halves])),
        )
        assert lost.mean == pytest.approx(expected.mean, abs=1e-5)
        assert lost.error == pytest.approx(expected.error, abs=1e-5)
        assert lost.error > 0


def test_what_is_held_out_chooses_nothing(infected):
    prepared = PreparedModel(infected, Preparation())
    session = RepairSession(prepared, guard="held-out", gradients_every=1)
    *_, logits, labels = on_halves(prepared, units(prepared, 3, 40))[0]
    acc, loss = session.peek_clean([3, 40])
    assert acc == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    half = ~every_second(prepared.clean.labels)
    alone = PreparedModel(
        InfectedModel.from_module(infected.network, (prepared.clean.images[half], prepared.clean.labels[half])),
        Preparation(),
    )
    session.try_prune(3)
    for derivatives, pruned in (
        (RepairSession(prepared, guard="held-out").derivatives(), ()),
        (session.derivatives(), (3,)),
    ):
        np.testing.assert_allclose(derivatives.harm, alone.gradients(units(alone, *pruned)).harm, atol=1e-5)
        np.testing.assert_allclose(derivatives.pull, prepared.gradients(units(prepared, *pruned)).pull, atol=1e-4)


def test_a_count_keeps_what_the_images_held_out_undo(prepared):
    lost = RepairSession(prepared, guard="held-out").masked.lost(units(prepared, 0))
    assert 0 < lost.mean < lost.at_most
    tight = (lost.mean + lost.at_most) / 2  # the mean is within it, and one standard error more is not
    for guard, budget, kept in (
        ("count", 0.0, True),
        ("count", tight, True),
        ("held-out", tight, False),
        ("held-out", lost.at_most + 1e-6, True),
        ("held-out", None, True),
    ):
        session = RepairSession(prepared, budget, guard=guard)
        attempt = session.try_prune(0)
        assert (attempt.pruned, attempt.undone) == (kept, not kept)
        assert session.state.pruned[0] == kept
        assert session.state.tried[0] == (not kept)
        assert not session.state.over_budget.any()  # what chooses does not know of it
        assert session.figures.acc == session.initial_figures.acc == 1.0


def test_what_chooses_must_keep_the_budget_itself(prepared):
    before, after, *_ = on_halves(prepared, units(prepared, 0))[0]
    lost = (before - after).mean().item()
    for budget, within in ((lost - 1e-4, False), (lost + 1e-4, True)):
        session = RepairSession(prepared, budget, guard="held-out")
        assert (session.peek_clean([0]) is not None) == within
        assert session.state.over_budget[0] == (not within)


def test_a_prune_that_costs_answers_is_undone_under_both(prepared):
    for guard in ("count", "held-out"):
        session = RepairSession(prepared, 0.02, guard=guard)
        session.accuracy_budget = None
        session.try_prune(0)
        session.accuracy_budget = 0.02
        assert session.try_prune(10).undone
        assert session.peek([10]).acc < 1 - 0.02


def test_the_environment_hands_the_guard_on(prepared):
    tight = RepairSession(prepared, guard="held-out").masked.lost(units(prepared, 0)).mean
    for guard, undone in (("count", False), ("held-out", True)):
        env = BackdoorPruneEnv(prepared.model, accuracy_budget=tight, guard=guard)
        env.reset(seed=0)
        assert env.session.guard == env.spec_options()["guard"] == guard
        assert env.step(0)[-1]["undone"] == undone
    layers = parallel_env(infected=prepared.model, accuracy_budget=tight, guard="held-out")
    layers.reset(seed=0)
    assert layers.single.session.guard == "held-out"


@pytest.mark.parametrize("guard", ["expectd", "", None, 1, ["count"]])
def test_an_unknown_guard_is_refused(infected, guard):
    with pytest.raises(UnknownNameError, match="guard"):
        BackdoorPruneEnv(infected, guard=guard)


class First:
    """Prunes the first unit, then stops."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return len(observation["action_mask"]) - 1 if state else 0, True


def test_repairs_go_by_the_expected_loss_and_tell_it(prepared):
    lost = RepairSession(prepared, guard="held-out").masked.lost(units(prepared, 0))
    undone = repair(prepared.model, First(), lost.mean)
    assert (undone.pruned, undone.lost) == ([], NOTHING_LOST)
    kept = repair(prepared.model, First(), lost.at_most + 1e-6)
    assert kept.pruned == ["1[0]"]
    assert kept.lost == lost
    assert (kept.report()["probability_lost"], kept.report()["probability_lost_error"]) == (lost.mean, lost.error)


def test_benchmarks_go_by_the_expected_loss(infected, monkeypatch, tmp_path):
    guards = []
    rounds = running.run_repair
    monkeypatch.setattr(
        running,
        "run_repair",
        lambda policy, env, *a, **k: guards.append(env.unwrapped.guard) or rounds(policy, env, *a, **k),
    )
    benchmark(infected, ["random"], [0.02], out=tmp_path / "table", jobs=1, max_steps=2)
    assert guards == ["held-out"]
