"""Sessions whose pruned neurons give their clean mean."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from backdoor_gym import parallel_env
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.masking.export import write_mask
from backdoor_gym.masking.fill import fill_values
from backdoor_gym.session import RepairSession
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


@pytest.fixture
def session(infected):
    return RepairSession(PreparedModel(infected, Preparation(fill="mean")), score_samples=64, gradients_every=1)


@torch.no_grad()
def test_figures_are_those_of_the_written_network(infected, session):
    prepared = session.prepared
    assert torch.equal(prepared.fill, fill_values(prepared.neurons, prepared.clean.images))
    for unit in (3, 40, 41, 10):
        session.try_prune(unit)
    mask = prepared.neuron_mask(session.state.pruned)
    written = write_mask(infected.network, prepared.neurons, mask, fill=prepared.fill)
    logits = written(prepared.clean.images)
    assert session.figures.acc == pytest.approx((logits.argmax(1) == prepared.clean.labels).float().mean().item())
    assert session.figures.loss == pytest.approx(F.cross_entropy(logits, prepared.clean.labels).item(), rel=1e-4)


def test_derivatives_of_a_session_are_those_by_whole_passes(session):
    session.try_prune(7)
    by_kept, whole = session.derivatives(), session.prepared.gradients(session.state.pruned)
    for name in ("pull", "harm", "clean_pull"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(by_kept, name), expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max())


def test_static_features_are_those_of_zeros(infected, session):
    zero = PreparedModel(infected, Preparation())
    assert zero.fill is None
    np.testing.assert_array_equal(session.prepared.features, zero.features)
    assert not np.allclose(session.prepared.first_gradients.harm, zero.first_gradients.harm)


@pytest.mark.parametrize("residual", ["channel", "group"])
def test_environments_of_all_kinds_take_it(infected, residual):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, residual=residual, fill="mean")
    env.reset(seed=0)
    _, _, _, _, info = env.step(5)
    twin = copy.deepcopy(env)
    assert twin.session.prepared.options.fill == "mean"
    assert twin.step(9)[-1]["acc"] == env.step(9)[-1]["acc"]
    assert env.spec_options()["fill"] == "mean"
    layers = parallel_env(infected=infected, residual=residual, fill="mean")
    layers.reset(seed=0)
    assert layers.single.session.prepared.fill.any()
    several = gym.make_vec("backdoor_gym:BackdoorPrune-v0", num_envs=2, infected=infected, residual=residual,
                           accuracy_budget=None, fill="mean")  # fmt: skip
    several.reset(seed=0)
    assert several.step([5, 5])[-1]["acc"].tolist() == [info["acc"]] * 2
    several.close()
