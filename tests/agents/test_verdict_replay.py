import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

import backdoor_gym
from backdoor_gym.agents import ONP
from backdoor_gym.agents.verdict_replay import VerdictReplay
from backdoor_gym.models.infecting import infect

from ..conftest import QUICK

gym.register_envs(backdoor_gym)


@pytest.fixture(scope="module")
def harmless():
    return infect("digits", "small_cnn", "clean", schedule=QUICK, architecture_options={"width": 16, "blocks": 2})


def make(models):
    return gym.make("BackdoorPrune-v0", infected=models, reward="oracle", max_steps=6, score_samples=32, max_units=112)


@pytest.mark.slow
def test_reinforcement_keeps_telling_clean_from_infected(infected, harmless, monkeypatch):
    """The steps of reinforcement are far too few here for the verdict to be learned from them."""
    monkeypatch.setattr("backdoor_gym.agents.verdict_replay.STEPS", 30)
    monkeypatch.setattr("backdoor_gym.agents.verdict_replay.BATCH_SIZE", 8)
    verdicts = []
    for callback in (None, VerdictReplay()):
        vector = DummyVecEnv([lambda: make([infected]), lambda: make([harmless])])
        onp = ONP(vector, seed=0, n_steps=8, batch_size=8, n_epochs=1, learning_rate=3e-3)
        onp.learn(32, callback=callback)
        verdicts.append([onp.verdict(make([model]).reset(seed=0)[0]) for model in (infected, harmless)])
    assert verdicts[0][0] - verdicts[0][1] < 0.5
    assert verdicts[1][0] > 0.9
    assert verdicts[1][1] < 0.1


@pytest.mark.slow
def test_without_clean_models_there_is_nothing_to_rehearse(infected):
    learned = []
    for callback in (None, VerdictReplay()):
        vector = DummyVecEnv([lambda: make([infected])])
        onp = ONP(vector, seed=0, n_steps=8, batch_size=8, n_epochs=1).learn(16, callback=callback)
        learned.append(torch.cat([value.flatten() for value in onp.network.state_dict().values()]))
    assert torch.equal(*learned)
