import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import backdoor_gym
from backdoor_gym.agents import ONP, EncoderOptions, GraphPolicy, GraphRolloutBuffer, LookAhead
from backdoor_gym.analysis.evidence import VERDICT_THRESHOLD
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.envs.observation import GLOBAL_FEATURES
from backdoor_gym.errors import DataError, ModelFileError
from backdoor_gym.models.infected import InfectedModel

from .conftest import PLANTED

gym.register_envs(backdoor_gym)
#: Looks at the clean loss and the budget alone.
PLAIN = LookAhead(danger_weight=0.0, done=0.0, patience=0, restore=False)
QUICK = {"n_steps": 16, "batch_size": 16, "n_epochs": 1}


def make(infected, **arguments):
    return gym.make(
        "BackdoorPrune-v0", infected=infected, **{"max_steps": 12, "score_samples": 0, "clean_samples": 50, **arguments}
    )


def same_weights(first, second):
    ours, theirs = first.network.state_dict(), second.network.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["acc", "oracle"])
def test_it_learns_to_find_the_planted_neuron(planted, reward):
    """In seconds, from clean images alone or with the trigger; a right episode is one prune and a stop."""
    make_one = lambda: make(planted, reward=reward, score_samples=100, clean_samples=None)  # noqa: E731
    onp = ONP(DummyVecEnv([make_one] * 4), seed=0, n_steps=32, batch_size=64, learning_rate=3e-3)
    onp.learn(2_500)
    env = make_one()
    observation, before = env.reset(seed=0)
    assert before["asr"] == 1
    actions, done = [], False
    while not done:
        action, _ = onp.predict(observation, deterministic=True)
        actions.append(int(action))
        observation, _, terminated, truncated, info = env.step(int(action))
        done = terminated or truncated
    assert actions[0] == PLANTED
    assert actions[-1] == 8
    assert info["asr"] == 0
    assert info["acc"] == before["acc"]


def test_maskable_ppo_takes_the_policy_class(infected, plain_infected, tmp_path):
    env = make([infected, plain_infected])
    model = MaskablePPO(GraphPolicy, env, policy_kwargs={"hops": 1}, seed=0, **QUICK).learn(32)
    model.save(tmp_path / "model")
    again = MaskablePPO.load(tmp_path / "model", env=env)
    observation, _ = env.reset(seed=0)
    masks = env.unwrapped.action_masks()
    first = model.predict(observation, action_masks=masks, deterministic=True)[0]
    assert first == again.predict(observation, action_masks=masks, deterministic=True)[0]
    assert masks[first]


def with_verdict(observation, probability):
    """The same observation of a network that has a backdoor with another probability."""
    figures = observation["globals"].copy()
    figures[GLOBAL_FEATURES.index("verdict")] = probability
    return {**observation, "globals": figures}


def test_without_chance_it_stops_only_where_that_is_likelier_than_to_go_on(infected):
    env = make(infected, accuracy_budget=None)
    model = MaskablePPO(GraphPolicy, env, seed=0, **QUICK)
    onp = ONP(env, seed=0)
    onp.network.load_state_dict(model.policy.network.state_dict())
    env.reset(seed=0)
    observation, *_ = env.step(0)
    masks = env.unwrapped.action_masks()
    for odds, stops in ((-0.1, False), (0.1, True)):
        for network in (model.policy.network, onp.network):
            network.stop[-1].weight.data.zero_()
            network.stop[-1].bias.data.fill_(odds)
        first = model.predict(observation, action_masks=masks, deterministic=True)[0]
        second = onp.predict(observation, deterministic=True)[0]
        assert first == second
        assert (first == 112) == stops


def test_the_observation_tells_the_probability_of_a_backdoor(infected):
    env = make(infected, accuracy_budget=None)
    observation, _ = env.reset(seed=0)
    told = observation["globals"][GLOBAL_FEATURES.index("verdict")]
    assert told == pytest.approx(env.unwrapped.session.prepared.evidence.probability)
    after, *_ = env.step(0)
    assert after["globals"][GLOBAL_FEATURES.index("verdict")] == told  # it is that of the network as it came


@pytest.mark.parametrize("stop", [-100.0, 100.0], ids=["that never stops", "that always stops"])
def test_before_the_first_prune_the_verdict_decides_and_not_the_policy(infected, stop):
    observation, _ = make(infected).reset(seed=0)
    onp = ONP(seed=0)
    onp.network.stop[-1].bias.data.fill_(stop)
    for probability, stops in ((0.0, True), (VERDICT_THRESHOLD - 0.01, True), (VERDICT_THRESHOLD, False), (1.0, False)):
        action, _ = onp.predict(with_verdict(observation, probability), deterministic=True)
        assert (action == 112) == stops
    onp.verdict_threshold = 0.0
    assert onp.predict(with_verdict(observation, 0.0), deterministic=True)[0] < 112


def test_what_the_network_scores_does_not_depend_on_the_verdict(infected):
    observation, _ = make(infected).reset(seed=0)
    low, high = (ONP(seed=0).logits(with_verdict(observation, probability)) for probability in (0.0, 1.0))
    np.testing.assert_array_equal(low, high)


@pytest.mark.slow
def test_the_shared_edges_change_nothing_in_training(infected, plain_infected):
    weights = []
    for options in ({}, {"rollout_buffer_class": GraphRolloutBuffer}):
        env = make([infected, plain_infected])
        model = MaskablePPO(GraphPolicy, env, seed=0, **QUICK, **options).learn(32)
        weights.append(model.policy.network.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=1e-3)


def test_other_environments_are_refused():
    with pytest.raises(DataError, match="BackdoorPrune-v0"):
        MaskablePPO(GraphPolicy, gym.make("CartPole-v1"))


@pytest.mark.slow
def test_training_is_reproducible(infected):
    first, second = (ONP(make(infected), seed=3, **QUICK).learn(32) for _ in range(2))
    assert same_weights(first, second)
    assert first.num_timesteps == 32
    assert not same_weights(first, ONP(make(infected), seed=4, **QUICK).learn(32))


def test_saved_and_loaded_it_acts_alike_on_networks_of_other_sizes(infected, plain_infected, tmp_path):
    onp = ONP(make(infected), seed=0, look_ahead=LookAhead(5, 2.0, 1.0), **QUICK).learn(32)
    file = onp.save(tmp_path / "deep" / "policy.safetensors")
    again = ONP.load(file)
    assert same_weights(onp, again)
    assert again.look_ahead == onp.look_ahead
    assert again.num_timesteps == 32
    observation, _ = make(plain_infected).reset(seed=0)
    action, _ = again.predict(observation, deterministic=True)
    assert observation["action_mask"][action]
    np.testing.assert_array_equal(again.logits(observation), onp.logits(observation))


def test_files_are_no_pickles_and_bad_ones_are_refused(infected, infected_file, tmp_path):
    file = ONP(encoder=EncoderOptions(hops=1)).save(tmp_path / "policy.safetensors")
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    described = json.loads(header["__metadata__"]["backdoor_gym"])
    assert described["encoder"]["options"]["hops"] == 1
    with pytest.raises(ModelFileError, match="onp-policy"):
        ONP.load(infected_file)
    with pytest.raises(ModelFileError, match="no file"):
        ONP.load(tmp_path / "none.safetensors")
    MaskablePPO(GraphPolicy, make(infected), **QUICK).save(tmp_path / "sb3.zip")
    with pytest.raises(ModelFileError, match="pickle"):
        ONP.load(tmp_path / "sb3.zip")


def test_a_policy_of_other_features_is_refused(tmp_path, monkeypatch):
    file = ONP().save(tmp_path / "policy.safetensors")
    monkeypatch.setattr("backdoor_gym.agents.encoder.NODE_FEATURES", ("colour",))
    with pytest.raises(ModelFileError, match="other features"):
        ONP.load(file)


class Stop(BaseCallback):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def _on_step(self):
        return self.num_timesteps < self.steps


@pytest.mark.slow
def test_an_interrupted_training_goes_on_from_its_checkpoint(infected, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    first = ONP(make(infected), seed=0, **QUICK)
    first.learn(96, callback=Stop(40), checkpoint=path)
    assert path.is_file()
    second = ONP(make(infected), seed=0, **QUICK)
    seen = []
    second.learn(96, callback=lambda local, _: seen.append(local["self"].num_timesteps) or True, checkpoint=path)
    assert seen[0] == 33
    assert seen[-1] == 96
    steps = {int(entry["step"]) for entry in second.trainer().policy.optimizer.state_dict()["state"].values()}
    assert steps == {6}  # one update a rollout, those before the interruption included
    assert second.num_timesteps == 96
    assert second.learn(96, checkpoint=path).num_timesteps == 96  # nothing is left to do
    assert second.learn(16).num_timesteps == 112


def test_a_checkpoint_of_another_shape_is_refused(infected, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    ONP(make(infected), seed=0, **QUICK).learn(64, checkpoint=path)
    with pytest.raises(ModelFileError, match="another shape"):
        ONP(make(infected), encoder=EncoderOptions(hops=1), **QUICK).learn(64, checkpoint=path)


def test_learning_needs_an_environment():
    with pytest.raises(DataError, match="environment"):
        ONP().learn(10)


def test_look_ahead_avoids_what_breaks_the_budget(infected):
    """With a budget of 0 and a policy without preference, only prunes that cost no clean image are left."""
    env = make(infected, accuracy_budget=0.0, max_steps=15, clean_samples=None)
    onp = ONP(env, seed=0, look_ahead=replace(PLAIN, candidates=20, loss_weight=50.0))
    onp.network.stop[-1].bias.data.fill_(-100)
    observation, before = env.reset(seed=0)
    for _ in range(10):
        action, _ = onp.predict(observation, deterministic=True)
        observation, _, _, _, info = env.step(int(action))
        assert not info["undone"]
    assert info["pruned"] == 10
    assert info["acc"] >= before["acc"]


def test_look_ahead_weighs_the_clean_loss_and_the_suspected_danger(infected):
    env = make(infected, accuracy_budget=None, clean_samples=None)
    observation, _ = env.reset(seed=0)
    logits = np.zeros(113, dtype=np.float32)
    figures = [env.unwrapped.session.peek([unit]) for unit in range(112)]
    base = env.unwrapped.session.peek([])
    losses = np.array([max(0.0, one.loss - base.loss) for one in figures])
    falls = np.array([base.suspected_danger - one.suspected_danger for one in figures])
    for look, quantity in (
        (replace(PLAIN, candidates=112, loss_weight=1.0), -losses),
        (LookAhead(112, 0.5, 2.0), 2 * falls - 0.5 * losses),
    ):
        corrected = look.correct(logits, observation, env.unwrapped.session)[:-1]
        looked_at = np.isfinite(corrected)
        np.testing.assert_allclose(corrected[looked_at], quantity[looked_at], atol=1e-6)
        assert corrected.max() == pytest.approx(quantity.max(), abs=1e-6)  # what was passed over is no better
    few = replace(PLAIN, candidates=3).correct(
        np.full(113, 0.0) + (np.arange(113) > 108), observation, env.unwrapped.session
    )
    assert set(np.isfinite(few).nonzero()[0]) <= {109, 110, 111, 112}


def test_the_repair_ends_where_the_suspected_trigger_fails(infected):
    env = make(infected, accuracy_budget=None)
    observation, _ = env.reset(seed=0)
    onp = ONP(env, seed=0, look_ahead=replace(PLAIN, candidates=2, loss_weight=0.0, done=0.5))
    onp.network.stop[-1].bias.data.fill_(-10.0)
    for unit in np.argsort(-env.unwrapped.session.prepared.gradients(env.unwrapped.session.state.pruned).pull):
        fails = env.unwrapped.session.figures.suspected_danger < 0.5
        assert (onp.predict(observation, deterministic=True)[0] == 112) == fails
        if fails:
            break
        observation, *_ = env.step(int(unit))
    assert fails
    onp.look_ahead = replace(
        PLAIN, candidates=2, loss_weight=0.0, done=0.99
    )  # above what it was at first: no sign of anything
    assert onp.predict(observation, deterministic=True)[0] < 112


@pytest.mark.slow
def test_the_repair_ends_where_the_suspected_danger_levels_off(infected, monkeypatch):
    env = make(infected, accuracy_budget=None, max_steps=40)
    observation, _ = env.reset(seed=0)
    onp = ONP(env, seed=0, look_ahead=replace(PLAIN, candidates=2, loss_weight=0.0, patience=4))
    onp.network.stop[-1].bias.data.fill_(-10.0)
    dangers = [env.unwrapped.session.figures.suspected_danger]
    monkeypatch.setattr("backdoor_gym.agents.look_ahead.LOW", 0.8 * dangers[0])
    for unit in np.argsort(-env.unwrapped.session.prepared.gradients(env.unwrapped.session.state.pruned).pull)[:30]:
        level = len(dangers) > 4 and dangers[-1] < 0.8 * dangers[0] and dangers[-5] - dangers[-1] < 0.02
        assert (onp.predict(observation, deterministic=True)[0] == 112) == level
        if level:
            break
        observation, *_ = env.step(int(unit))
        dangers.append(env.unwrapped.session.figures.suspected_danger)
    assert level


def test_where_nothing_is_suspected_the_suspected_danger_ends_no_repair(infected):
    """Without batch normalisation, and with images of one label: no trigger can be sought."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10)).eval()
    one = infected.clean.labels == 2
    clean = LabelledImages(infected.clean.images[one], infected.clean.labels[one])
    env = make(InfectedModel(network, clean), accuracy_budget=None)
    look = replace(PLAIN, candidates=2, loss_weight=0.0, done=0.5)
    onp = ONP(env, seed=0, look_ahead=look, verdict_threshold=0.0)
    onp.network.stop[-1].bias.data.fill_(-10.0)
    observation, _ = env.reset(seed=0)
    assert env.unwrapped.session.prepared.inverted is None
    for _ in range(2):
        action, _ = onp.predict(observation, deterministic=True)
        assert action < 4
        observation, *_ = env.step(int(action))


@pytest.mark.slow
def test_what_breaks_the_budget_is_out(infected, monkeypatch):
    env = make(infected, accuracy_budget=0.0, clean_samples=None)
    observation, before = env.reset(seed=0)
    breaks = np.array([env.unwrapped.session.peek([unit]).acc < before["acc"] for unit in range(112)])
    assert breaks.any()
    logits = np.append(breaks.astype(np.float32), 0)  # those that break it are liked best
    corrected = replace(PLAIN, candidates=112).correct(logits, observation, env.unwrapped.session)
    assert not breaks[np.isfinite(corrected[:-1])].any()
    assert np.isfinite(corrected[:-1]).any()
    onp = ONP(env, seed=0, look_ahead=replace(PLAIN, candidates=1))
    onp.logits = lambda observation: logits[None]
    observation, _ = env.reset(seed=0)
    assert not breaks[onp.predict(observation, deterministic=True)[0]]  # they gave their place to the next
    assert breaks[env.unwrapped.session.state.over_budget].all()
    assert env.unwrapped.session.state.over_budget.sum() == breaks.sum()
    looked_at = []
    session = env.unwrapped.session
    peek_clean = session.peek_clean
    monkeypatch.setattr(session, "peek_clean", lambda units: looked_at.extend(units) or peek_clean(units))
    replace(PLAIN, candidates=112).correct(logits, observation, env.unwrapped.session)
    assert looked_at
    assert not breaks[looked_at].any()  # and are not looked at again
    observation, _ = env.reset(seed=0)
    monkeypatch.setattr("backdoor_gym.agents.look_ahead.MOST", int(breaks.sum()))
    assert onp.predict(observation, deterministic=True)[0] == 112  # nothing that may be looked at is left


def test_a_repair_stops_below_the_threshold(infected, tmp_path):
    env = make(infected)
    env.reset(seed=0)
    onp = ONP(seed=0, threshold=0.3)
    onp.network.stop[-1].bias.data.fill_(3.0)
    again = ONP.load(onp.save(tmp_path / "onp.safetensors"))
    assert (again.threshold, again.verdict_threshold) == (0.3, VERDICT_THRESHOLD)
    other = ONP.load(tmp_path / "onp.safetensors", threshold=0.2)
    assert (other.threshold, other.verdict_threshold) == (0.2, VERDICT_THRESHOLD)
    observation, *_ = env.step(0)
    for threshold, stops in ((0.5, True), (1e-4, False), (0.0, False)):
        onp.threshold = threshold
        assert (onp.predict(observation, deterministic=True)[0] == 112) == stops


@pytest.mark.parametrize("name", ["threshold", "verdict_threshold"])
def test_a_threshold_is_a_probability(name):
    for wrong in (1.5, 1.0, -0.1, float("nan")):
        with pytest.raises(DataError, match=name):
            ONP(**{name: wrong})
    assert getattr(ONP(**{name: 0.0}), name) == 0


@pytest.mark.parametrize("kind", [DummyVecEnv, pytest.param(SubprocVecEnv, marks=pytest.mark.slow)])
def test_it_looks_ahead_in_vector_environments(infected_file, kind):
    env = make_vec_env(lambda: make(str(infected_file)), n_envs=2, vec_env_cls=kind)
    onp = ONP(env, seed=0, look_ahead=LookAhead(candidates=2))
    mean, spread = evaluate_policy(onp, env, n_eval_episodes=2, warn=False)
    alone = make(str(infected_file))
    onp.set_env(alone)
    expected = evaluate_policy(onp, alone, n_eval_episodes=1, warn=False)[0]
    assert (mean, spread) == (pytest.approx(expected, abs=1e-6), 0)  # a vector's monitor rounds to six places
    env.close()
