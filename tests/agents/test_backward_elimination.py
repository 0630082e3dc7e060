import gymnasium as gym
import numpy as np
import pytest
import torch

import backdoor_gym
from backdoor_gym import repair
from backdoor_gym.agents import ONP, LookAhead
from backdoor_gym.agents.backward_elimination import restore
from backdoor_gym.agents.validation import run
from backdoor_gym.baselines import CLP
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.policies.contract import finish
from backdoor_gym.rendering.drawing import Snapshot

from .conftest import PLANTED, Planted

gym.register_envs(backdoor_gym)
LOOK = LookAhead(done=0.0)


@pytest.fixture
def env(planted):
    return BackdoorPruneEnv(planted, accuracy_budget=None, score_samples=100)


def test_what_carries_the_backdoor_stays_pruned_and_the_rest_comes_back(env, planted):
    env.reset(seed=0)
    rewards = [env.step(unit)[1] + env.step_cost for unit in (0, PLANTED, 6)]
    earned = restore(env.session, LOOK, env.worth)
    assert np.flatnonzero(env.session.state.pruned).tolist() == [PLANTED]
    assert env.session.figures.asr == 0
    whole = env.session.figures
    drawn = Snapshot.of(env.session)
    assert drawn.given_back == 2
    assert (drawn.acc[-1], drawn.asr[-1]) == (whole.acc, whole.asr)
    assert len(drawn.acc) == 1 + 3 + 2
    env.reset(seed=0)
    env.step(PLANTED)
    assert env.session.figures == whole
    assert Snapshot.of(env.session).given_back == 0
    before = env.session.masked.figures(np.zeros(8, dtype=bool))
    # all in all, what the prunes earned together with what giving them back did is what the one earns
    dangers = before.suspected_danger - whole.suspected_danger
    assert sum(rewards) + earned == pytest.approx(dangers - 2 * (before.acc - whole.acc), abs=1e-6)


def test_the_suspected_danger_may_rise_to_where_a_repair_ends(env):
    for done, left in ((0.0, [PLANTED]), (1.0, [])):
        env.reset(seed=0)
        env.step(PLANTED)
        restore(env.session, LookAhead(done=done))
        assert np.flatnonzero(env.session.state.pruned).tolist() == left


def test_what_lowers_the_loss_stays_pruned(env, monkeypatch):
    for sign, left in ((1, [PLANTED]), (-1, [PLANTED, 6])):
        env.reset(seed=0)
        env.step(PLANTED)
        env.step(6)
        look = env.session.peek_clean
        monkeypatch.setattr(
            env.session, "peek_clean", lambda *a, restored=(), s=sign, f=look, **k: (1.0, -s * len(restored))
        )
        restore(env.session, LOOK)
        assert np.flatnonzero(env.session.state.pruned).tolist() == left


def test_what_would_break_the_budget_stays_pruned(env):
    env.reset(seed=0)
    env.step(PLANTED)
    env.accuracy_budget = -1.0
    assert restore(env.session, LookAhead(done=1.0)) == 0
    assert env.session.state.pruned[PLANTED]


def test_without_a_sign_of_the_trigger_nothing_comes_back(planted):
    """Without BN and with images of one label no trigger is inverted: where danger did not fall, nothing tells what to keep."""
    network = Planted().eval()
    network.norm = torch.nn.Identity()
    one_label = planted.clean.labels == planted.clean.labels[0]
    blind = InfectedModel.from_module(network, (planted.clean.images[one_label], planted.clean.labels[one_label]))
    env = BackdoorPruneEnv(blind, accuracy_budget=None, score_samples=0)
    env.reset(seed=0)
    for unit in (PLANTED, 6):
        env.step(unit)
    assert restore(env.session, LOOK) == 0
    assert env.session.state.pruned.sum() == 2


@pytest.mark.slow
def test_repairs_and_validation_end_with_it(infected, tmp_path):
    asked = {"max_steps": 40, "accuracy_budget": 0.15}
    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=64, guard="held-out", max_failures=15, **asked)
    onp = ONP.load("pretrained", env)
    onp.threshold = 1e-6  # on to the end, so that there is something to give back
    onp.look_ahead = LookAhead(20, done=0.0, patience=0, restore=False)
    all_of_them = run(onp, env, [infected])[0]
    onp.look_ahead = LookAhead(20, done=0.0, patience=0)
    rest = run(onp, env, [infected])[0]
    assert 0 < rest.pruned < all_of_them.pruned
    file = onp.save(tmp_path / "policy.safetensors")
    result = repair(infected, str(file), **asked)
    assert len(result.pruned) == rest.pruned == (~result.mask).sum()
    assert result.clean_acc_after == pytest.approx(
        (result.network(infected.clean.images).argmax(1) == infected.clean.labels).float().mean().item()
    )


def test_it_can_be_left_out(env):
    onp = ONP(seed=0, look_ahead=LookAhead(2, restore=False))
    env.reset(seed=0)
    env.step(6)
    assert onp.finish(env) == 0
    assert env.session.state.pruned.sum() == 1
    onp.look_ahead = None
    assert onp.finish(env) == finish(onp, env) == finish(CLP(env), env) == 0
    assert env.session.state.pruned.sum() == 1


def test_only_what_is_pruned_can_be_given_back(env):
    env.reset(seed=0)
    env.step(PLANTED)
    for unit in (3, -3, 8):
        with pytest.raises(backdoor_gym.errors.DataError, match="not pruned"):
            env.session.restore(unit, env.worth)
