"""Real images, where they are: BACKDOOR_GYM_DATA names a folder with cifar10 in the Hub's layout."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from backdoor_gym import InfectedModel
from backdoor_gym.baselines import clp
from backdoor_gym.data.datasets import load_images, num_classes, split_size
from backdoor_gym.data.hub import DATA_VARIABLE
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.metrics import evaluate

MODEL = Path(__file__).parents[1] / "benchmarks" / "models" / "resnet18-badnets.safetensors"

pytestmark = pytest.mark.skipif(
    not (Path(os.environ.get(DATA_VARIABLE, "/nonexistent")) / "cifar10").is_dir(),
    reason=f"{DATA_VARIABLE} names no folder with cifar10",
)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("datasets")
    return InfectedModel.load(MODEL)


def test_the_data_set_is_read_as_from_the_hub():
    pytest.importorskip("datasets")
    assert split_size("uoft-cs/cifar10", "train") == 50_000
    assert num_classes("uoft-cs/cifar10", "train") == 10
    images, labels = load_images("uoft-cs/cifar10", "test", range(100))
    assert images.shape == (100, 3, 32, 32)
    assert images.max() > 0.9
    assert labels.unique().numel() == 10


@pytest.mark.slow
def test_the_recorded_model_is_infected_and_clp_mends_it(model):
    few = model.test.first(600)
    before = evaluate(model.network, few.images, few.labels, model.trigger, model.target)
    assert before.acc > 0.78
    assert before.asr > 0.95
    repaired = clp.prune(model.network, u=3.0)
    after = evaluate(repaired, few.images, few.labels, model.trigger, model.target)
    assert after.asr < before.asr
    assert before.acc - after.acc < 0.1


@pytest.mark.slow
def test_the_environment_runs_on_it(model):
    env = BackdoorPruneEnv(model, clean_samples=100, score_samples=50)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["num_nodes"][0] == 1200
    assert info["acc"] > 0.7
    assert np.isfinite(observation["nodes"]).all()
    assert env.step(int(observation["nodes"][:, 0].argmax()))[4]["acc"] > 0.5


def test_clean_and_test_images_are_not_training_images(model):
    assert model.clean.source.split == "train"
    assert model.test.source.split == "test"
    assert len(model.clean) == 500
    assert torch.bincount(model.clean.labels, minlength=10).min() > 20
