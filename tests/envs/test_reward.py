from dataclasses import replace

import numpy as np
import pytest

from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.reward import ACCURACY_WEIGHT, CLEAN_PRUNE_COST, Transition, accuracy_reward, oracle_reward
from backdoor_gym.errors import DataError
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.session.masked_model import Figures


@pytest.fixture
def prepared(infected):
    env = BackdoorPruneEnv(infected)
    env.reset(seed=0)
    return env.session.prepared


def test_accuracy_reward_is_the_fall_of_the_suspected_danger_minus_accuracy_lost(prepared):
    before, after = Figures(0.98, 0.1, suspected_danger=0.9), Figures(0.97, 0.1, suspected_danger=0.5)
    assert accuracy_reward(Transition(prepared, 3, before, after)) == pytest.approx(0.4 - 0.01 * ACCURACY_WEIGHT)


def test_the_accuracy_reward_never_looks_at_the_trigger(infected):
    """The same rewards with the trigger known and unknown, at every step of an episode."""
    rewards = []
    for model in (infected, InfectedModel(infected.network, infected.clean)):
        env = BackdoorPruneEnv(model, accuracy_budget=None)
        env.reset(seed=0)
        rewards.append([env.step(unit)[1] for unit in range(0, 112, 9)])
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) > 5


def test_losing_half_of_the_accuracy_outweighs_everything(prepared):
    reward, acc, danger, total = accuracy_reward, 0.98, 1.0, 0.0
    for unit in range(len(prepared)):
        before = Figures(acc, 0, suspected_danger=danger)
        acc, danger = acc - 0.5 / len(prepared), danger - 1 / len(prepared)
        total += reward(Transition(prepared, unit, before, Figures(acc, 0, suspected_danger=danger)))
    assert total <= 1e-9


def test_oracle_reward_is_the_fall_of_danger_minus_accuracy_lost(prepared):
    before = Figures(0.98, 0.1, asr=1.0, ra=0.0, danger=0.9)
    after = replace(before, acc=0.96, danger=0.3)
    assert oracle_reward(Transition(prepared, 0, before, after)) == pytest.approx(0.6 - 0.02 * ACCURACY_WEIGHT)


def test_oracle_reward_charges_for_accuracy_on_test_images_where_there_are_any(prepared):
    before = Figures(0.98, 0.1, asr=1.0, ra=0.0, danger=0.9, test_acc=0.97)
    after = replace(before, acc=0.98, danger=0.3, test_acc=0.93)
    assert oracle_reward(Transition(prepared, 0, before, after)) == pytest.approx(0.6 - 0.04 * ACCURACY_WEIGHT)


def test_oracle_reward_needs_the_trigger(infected):
    env = BackdoorPruneEnv(InfectedModel(infected.network, infected.clean), reward="oracle")
    env.reset(seed=0)
    with pytest.raises(DataError, match="trigger"):
        env.step(0)


def test_in_a_clean_model_every_prune_costs(infected):
    model = InfectedModel(infected.network, infected.clean, facts={"attack": "clean"})
    env = BackdoorPruneEnv(model, reward="oracle", accuracy_budget=None, step_cost=0.0)
    _, info = env.reset(seed=0)
    total, acc = 0.0, info["acc"]
    for unit in (1, 20, 40):
        _, reward, _, _, info = env.step(unit)
        total += reward
    assert total == pytest.approx(-3 * CLEAN_PRUNE_COST - ACCURACY_WEIGHT * (acc - info["acc"]))


def test_a_callable_is_a_reward(infected):
    env = BackdoorPruneEnv(
        infected, reward=lambda transition: float(transition.unit), step_cost=0.5, accuracy_budget=None
    )
    env.reset(seed=0)
    assert env.step(7)[1] == 6.5
    assert env.step(7)[1] == -0.5


def test_danger_falls_with_the_attack(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None)
    env.reset(seed=0)
    whole = env.session.masked.figures(np.zeros(len(env.session.prepared), dtype=bool))
    assert whole.asr > 0.9
    assert whole.danger > 0.8
    assert whole.asr / 2 <= whole.danger <= (whole.asr + 1) / 2
    pulling = np.zeros(len(env.session.prepared), dtype=bool)
    pulling[np.argsort(-env.session.prepared.features[:, STATIC_FEATURES.index("pull")])[:12]] = True
    without = env.session.masked.figures(pulling)
    assert without.danger < whole.danger
    assert without.suspected_danger < whole.suspected_danger
