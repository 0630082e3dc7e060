"""Ridge: a scorer that ships, and looks ahead without any neural network."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from sklearn.linear_model import Ridge as Regression

from backdoor_gym import repair
from backdoor_gym.agents import LookAhead, ScoringPolicy
from backdoor_gym.agents.warm_start import examples
from backdoor_gym.baselines import Ridge
from backdoor_gym.baselines.ridge import FEATURES, PENALTY
from backdoor_gym.envs.observation import NODE_FEATURES
from backdoor_gym.errors import UnknownNameError

RECORD = Path(__file__).parents[2] / "benchmarks/results/onp_ridge.json"


def test_the_shipped_weights_are_those_of_the_record():
    fitted = json.loads(RECORD.read_text(encoding="utf-8"))["None"]
    assert Ridge.load() == Ridge(tuple(fitted["coefficients"]), fitted["intercept"])
    assert len(Ridge.load().coefficients) == len(FEATURES)


def test_it_scores_each_unit_by_its_features_and_never_stops(infected):
    observation, _ = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0).reset(seed=0)
    ridge = Ridge.load()
    scores = ridge.scores(observation)
    assert scores.shape == (1, 113)
    assert np.isneginf(scores[0, -1])
    for unit in (0, 40, 111):
        row = dict(zip(NODE_FEATURES, observation["nodes"][unit].tolist(), strict=True))
        expected = ridge.intercept + sum(
            weight * row[name] for name, weight in zip(FEATURES, ridge.coefficients, strict=True)
        )
        assert scores[0, unit] == pytest.approx(expected, abs=1e-5)
    batch = {key: np.stack([value] * 2) for key, value in observation.items()}
    np.testing.assert_array_equal(ridge.scores(batch), np.concatenate([scores] * 2))


def test_it_is_fitted_to_the_preferences_of_the_warm_start(infected):
    [example] = examples([infected], score_samples=50)
    states = list(zip(example.observation["nodes"], example.preference, strict=True))
    states.append((states[0][0], np.eye(113, dtype=np.float32)[112]))  # a state to stop in says nothing of units
    columns = [NODE_FEATURES.index(name) for name in FEATURES]
    rows, targets = [], []
    for nodes, preference in states[:-1]:
        logarithms = {unit: np.log(float(value)) for unit, value in enumerate(preference[:-1]) if value}
        rows += [nodes[unit, columns] for unit in logarithms]
        targets += [value - np.mean(list(logarithms.values())) for value in logarithms.values()]
    expected = Regression(PENALTY).fit(np.array(rows, dtype=np.float64), targets)
    fitted = Ridge.fit(states)
    np.testing.assert_allclose(fitted.coefficients, expected.coef_, rtol=1e-6, atol=1e-9)
    assert fitted.intercept == pytest.approx(expected.intercept_)


@pytest.mark.slow
def test_a_repair_looks_ahead_with_it(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0)
    observation, _ = env.reset(seed=0)
    alone, ahead = (ScoringPolicy(Ridge.load(), env, look_ahead=look) for look in (None, LookAhead()))
    scores = Ridge.load().scores(observation)[0]
    assert alone.predict(observation, deterministic=True)[0] == scores[:-1].argmax()
    corrected = LookAhead().correct(scores, observation, env.unwrapped.session)
    assert ahead.predict(observation, deterministic=True)[0] == corrected[:-1].argmax()
    result = repair(infected, "ridge", 0.1, max_steps=40)
    assert result.after.asr < result.before.asr
    assert result.lost.at_most <= 0.1 + 1e-6
    assert result.clean_acc_before - result.clean_acc_after <= 0.1 + 1e-9
    assert result.verdict == env.unwrapped.session.prepared.evidence.probability
    assert result.outcome == "repaired"
    careful = repair(infected, "ridge", 0.02, max_steps=40, take_back=False)
    assert careful.lost.at_most <= 0.02 + 1e-6
    assert careful.clean_acc_before - careful.clean_acc_after <= 0.02 + 1e-9
    assert careful.after.asr <= careful.before.asr
    first = env.unwrapped.session.prepared.unit_names[scores[:-1].argmax()]
    once = {"max_steps": 1, "look_ahead": False}
    assert repair(infected, "ridge", None, verdict=False, **once).pruned == [first]
    with pytest.raises(UnknownNameError, match="finetune"):
        repair(infected, "ridge", finetune=3)


def test_any_scorer_looks_ahead_and_stops(infected):
    class Pull:
        """Scores by one feature, and stops where no unit has a larger one than 1."""

        def scores(self, observation):
            pull = observation["nodes"][..., NODE_FEATURES.index("pull_now")].reshape(-1, 112)
            return np.hstack([pull, np.full((len(pull), 1), 1.0, dtype=np.float32)])

    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0, accuracy_budget=None)
    observation, _ = env.reset(seed=0)
    policy = ScoringPolicy(Pull(), env)
    unit = int(policy.predict(observation, deterministic=True)[0])
    assert unit == observation["nodes"][:112, NODE_FEATURES.index("pull_now")].argmax()
    observation, *_ = env.step(unit)
    legal = observation["action_mask"][:112] == 1
    odds = np.logaddexp.reduce(observation["nodes"][:112, NODE_FEATURES.index("pull_now")][legal].astype(float)) - 1.0
    going_on = 1 / (1 + np.exp(-odds))
    for threshold, stops in ((min(0.999, going_on + 0.001), True), (going_on - 0.01, False)):
        policy.threshold = threshold
        assert (policy.predict(observation, deterministic=True)[0] == 112) == stops
    policy.look_ahead = LookAhead()
    assert 0 <= policy.predict(observation, deterministic=True)[0] < 112
