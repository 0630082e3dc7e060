import numpy as np
import pytest
from torch import nn

from backdoor_gym.agents import ONP
from backdoor_gym.baselines import CLP, Magnitude, RandomPolicy, bnp, clp
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import BackdoorGymError, DataError
from backdoor_gym.policies.thresholds import check_threshold


@pytest.fixture(scope="module")
def seen(infected):
    env = BackdoorPruneEnv(infected)
    return env, env.reset(seed=0)[0]


def wrong_observations(seen):
    return [
        None, 5, [], {}, "x", {"nodes": seen["nodes"]}, {**seen, "nodes": seen["nodes"][:5]},
        {**seen, "nodes": np.full_like(seen["nodes"], np.nan)}, {**seen, "globals": seen["globals"][:3]},
        {**seen, "edge_links": seen["edge_links"] + 10**6}, {**seen, "num_nodes": seen["num_nodes"] + 10**6},
        {**seen, "num_edges": np.array([-1])}, {**seen, "action_mask": np.zeros_like(seen["action_mask"])},
        {**seen, "nodes": seen["nodes"].tolist()}, {**seen, "nodes": seen["nodes"].astype(object)},
        {**seen, "nodes": seen["nodes"][None]}, {**seen, "edges": seen["edges"][:3]}, {**seen, "nodes": seen["nodes"][None, None]},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["ONP", "CLP", "random", "magnitude"])
def test_policies_are_given_observations(seen, kind):
    env, observation = seen
    policy = {
        "ONP": lambda: ONP.load(env=env),
        "CLP": lambda: CLP(env, 3.0),
        "random": lambda: RandomPolicy(0),
        "magnitude": lambda: Magnitude(env, 1.0),
    }[kind]()
    expected, _ = policy.predict(observation, deterministic=True) if kind != "random" else (None, None)
    for wrong in wrong_observations(observation):
        with pytest.raises(DataError):
            policy.predict(wrong, deterministic=True)
    for masks in ("x", 5, [1, 0], [[None]], object(), np.zeros_like(observation["action_mask"])):
        with pytest.raises(DataError):
            policy.predict(observation, action_masks=masks, deterministic=True)
    for start in ("xy", [1, 0, 1]):
        with pytest.raises(DataError):
            policy.predict({key: value[None] for key, value in observation.items()}, episode_start=[*start])
    if expected is not None:
        assert policy.predict(observation, deterministic=True)[0] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("env", 5), ("look_ahead", True), ("threshold", "x"), ("threshold", 2), ("verdict_threshold", []), ("encoder", 5),
        ("seed", "x"), ("device", "gpu"), ("tensorboard_log", 5), ("nothing_like_it", 5), ("policy", "MlpPolicy"),
    ],
)  # fmt: skip
def test_onp_of_wrong_arguments(name, value):
    with pytest.raises(BackdoorGymError):
        ONP(**{name: value})


def test_onp_learns_a_number_of_steps(seen):
    with pytest.raises(DataError, match="total_timesteps"):
        ONP(seen[0]).learn("many")
    with pytest.raises(DataError, match="observation"):
        ONP().predict(5)


def test_pruning_outside_an_environment_takes_networks_and_images(infected):
    network, pair = infected.network, (infected.clean.images, infected.clean.labels)
    for arguments in (
        (5,),
        (infected,),
        (network, []),
        (network, 3.0),
        (network, None, "x"),
        (network, 5, 3.0),
        (network, (1,), "auto"),
    ):
        with pytest.raises(DataError):
            clp.prune(*arguments)
    for arguments in ((5, pair), (network, 5), (network, (5, 5)), (network, pair, "x"), (network, pair, 3.0, "x")):
        with pytest.raises(DataError):
            bnp.prune(*arguments)
    with pytest.raises(BackdoorGymError):
        clp.prune(nn.Identity())


@pytest.mark.parametrize("threshold", [None, [], ["auto"], np.zeros(3), float("nan"), 10**400, True, "automatic"])
def test_thresholds_are_numbers_or_two_words(threshold):
    with pytest.raises(DataError, match="a threshold must be"):
        check_threshold(threshold)


def test_the_random_policy_has_a_whole_seed():
    with pytest.raises(DataError, match="seed"):
        RandomPolicy(seed="x")
