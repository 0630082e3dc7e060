"""ONP's network under RLlib, on a cluster of this machine alone."""

import numpy as np
import pytest
import torch

pytest.importorskip("ray.rllib")

import ray
from ray.rllib.core.columns import Columns

from backdoor_gym.agents import ONP
from backdoor_gym.agents.encoder import EncoderOptions, as_tensors
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.on_ray.rllib import GraphRLModule, train_on_cluster
from backdoor_gym.policies.registry import make_policy

SMALL = {"runners": 1, "envs": 2, "epochs": 1, "n_steps": 8, "minibatch_size": 16, "num_epochs": 1}


@pytest.fixture(scope="module", autouse=True)
def one_machine():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def files(infected_file, plain_infected_file):
    return [str(infected_file), str(plain_infected_file)]


def test_the_module_is_the_network_with_illegal_actions_masked(infected_file):
    env = BackdoorPruneEnv(str(infected_file), accuracy_budget=None)
    env.reset(seed=0)
    observation, *_ = env.step(3)
    onp = ONP(encoder=EncoderOptions(hidden=16), seed=0)
    module = GraphRLModule(
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config={
            "encoder": {"hidden": 16},
            "weights": {key: value.numpy() for key, value in onp.network.state_dict().items()},
        },
    )
    batch = {Columns.OBS: {**as_tensors(observation), "action_mask": torch.as_tensor(observation["action_mask"])[None]}}
    logits = module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS][0].detach().numpy()
    legal = observation["action_mask"].astype(bool)
    assert np.allclose(logits[legal], onp.logits(observation)[0][legal])
    assert (logits[~legal] < -1e7).all()
    assert module.compute_values(batch).shape == (1,)


def test_trained_on_a_cluster_it_is_a_policy_like_any_other(files, tmp_path):
    out, said = tmp_path / "policy.safetensors", []
    train_on_cluster(files, files[:1], 32, out, "auto", report=said.append, **SMALL)
    assert not (tmp_path / "policy.safetensors.checkpoint").exists()
    validated = [line for line in said if "timesteps" in line]
    assert [line.split("timesteps ")[1] for line in validated] == ["0.000", "32.000"]
    env = BackdoorPruneEnv(files[0], max_steps=3)
    observation, _ = env.reset(seed=0)
    action, _ = make_policy(str(out), env, {}).predict(observation, None, np.ones(1, dtype=bool), deterministic=True)
    assert env.action_space.contains(np.int64(action))
