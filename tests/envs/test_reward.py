from dataclasses import replace

import numpy as np
import pytest

from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.reward import ACCURACY_WEIGHT, AccuracyReward, Transition, oracle_reward, suspicion
from backdoor_gym.envs.victim import Figures
from backdoor_gym.errors import DataError
from backdoor_gym.graph.features import STATIC_FEATURES
from backdoor_gym.infected import InfectedModel


@pytest.fixture
def victim(infected):
    env = BackdoorPruneEnv(infected)
    env.reset(seed=0)
    return env.victim


def test_suspicion_points_at_what_stands_out_and_sums_to_one(victim):
    weights = suspicion(victim)
    assert weights.sum() == pytest.approx(1)
    scores = victim.features[:, [STATIC_FEATURES.index("uclc"), STATIC_FEATURES.index("kl")]].max(axis=1)
    assert np.array_equal(weights > 0, scores > 2)
    assert weights.argmax() == scores.argmax()


def test_accuracy_reward_is_suspicion_minus_accuracy_lost(victim):
    unit = int(suspicion(victim).argmax())
    before, after = Figures(0.98, 0.1), Figures(0.97, 0.1)
    reward = AccuracyReward()(Transition(victim, unit, before, after))
    assert reward == pytest.approx(suspicion(victim)[unit] - 0.01 * ACCURACY_WEIGHT)


def test_losing_five_points_outweighs_everything(victim):
    reward, acc, total = AccuracyReward(), 0.98, 0.0
    for unit in range(len(victim)):
        after = acc - 0.05 / len(victim)
        total += reward(Transition(victim, unit, Figures(acc, 0), Figures(after, 0)))
        acc = after
    assert total <= 1e-9


def test_oracle_reward_is_the_fall_of_danger_minus_accuracy_lost(victim):
    before = Figures(0.98, 0.1, asr=1.0, ra=0.0, danger=0.9)
    after = replace(before, acc=0.96, danger=0.3)
    assert oracle_reward(Transition(victim, 0, before, after)) == pytest.approx(0.6 - 0.02 * ACCURACY_WEIGHT)


def test_oracle_reward_needs_the_trigger(infected):
    env = BackdoorPruneEnv(InfectedModel(infected.network, infected.clean), reward="oracle")
    env.reset(seed=0)
    with pytest.raises(DataError, match="trigger"):
        env.step(0)


def test_in_a_clean_model_the_oracle_knows_that_only_accuracy_counts(infected):
    model = InfectedModel(infected.network, infected.clean, facts={"attack": "clean"})
    env = BackdoorPruneEnv(model, reward="oracle", accuracy_budget=None, step_cost=0.0)
    _, info = env.reset(seed=0)
    total, acc = 0.0, info["acc"]
    for unit in (1, 20, 40):
        _, reward, _, _, info = env.step(unit)
        total += reward
    assert total == pytest.approx(-ACCURACY_WEIGHT * (acc - info["acc"]))


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
    whole = env.victim.figures(np.zeros(len(env.victim), dtype=bool))
    nothing = env.victim.figures(np.ones(len(env.victim), dtype=bool))
    assert whole.asr > 0.9
    assert whole.danger > 0.8
    assert 0 <= nothing.danger <= 1
    assert (whole.asr + 0) / 2 <= whole.danger <= (whole.asr + 1) / 2
