"""Calls in the wrong order or of a wrong type end in a typed error, and the episode goes on as if they had not been made."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import backdoor_gym
from backdoor_gym.envs.layers import BackdoorPruneLayersEnv
from backdoor_gym.envs.options import MOST_UNITS
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.vector import BackdoorPruneVectorEnv
from backdoor_gym.errors import BackdoorGymError, DataError, UnknownNameError
from backdoor_gym.session.masked_model import MaskedModel

ODD = (
    None,
    "x",
    -1,
    10**30,
    10**5000,
    2.5,
    float("nan"),
    [0.5],
    [[0], [0, 1]],
    {},
    object(),
    "A" * 10**6,
    np.zeros((2, 2)),
)


@pytest.fixture(scope="module")
def misused(infected):
    return BackdoorPruneEnv(infected, accuracy_budget=None)


@pytest.mark.parametrize("call", ["observe", "info", "action_masks"])
def test_methods_before_reset(misused, call):
    with pytest.raises(gym.error.ResetNeeded):
        getattr(misused, call)()


@pytest.mark.parametrize("name", ["session", "step_limit"])
def test_attributes_before_reset(misused, name):
    with pytest.raises(gym.error.ResetNeeded):
        getattr(misused, name)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("prune_unit", (0,)), ("consult", (len,)), ("render", ())],
)
def test_calls_before_reset(infected, call, arguments):
    env = BackdoorPruneEnv(infected, render_mode="ansi")
    with pytest.raises(gym.error.ResetNeeded):
        getattr(env, call)(*arguments)


def same(one, other):
    assert all(np.array_equal(one[0][key], other[0][key]) for key in one[0])
    assert one[1:] == other[1:]


def test_wrong_calls_leave_the_episode_as_it_was(infected):
    env, twin = (BackdoorPruneEnv(infected, accuracy_budget=None) for _ in range(2))
    same((*env.reset(seed=3),), (*twin.reset(seed=3),))
    same(env.step(5), twin.step(5))
    calls = [
        *((env.step, (odd,)) for odd in (*ODD, True, np.array([1]), np.float32(1))),
        *((env.prune_unit, (odd,)) for odd in ODD if not isinstance(odd, int) or odd < 0),
        *((env.session.restore, (odd,)) for odd in (*ODD, 1)),
        *((env.session.peek, (odd,)) for odd in (*ODD[:7], [-1], [10**6], [0.5], [[0], [0, 1]], [10**30])),
        *((env.session.suspected_fall, (odd,)) for odd in (*ODD[:3], 2.5)),
        (env.consult, (5,)),
    ]
    for call, arguments in calls:
        with pytest.raises((BackdoorGymError, gym.error.Error)) as told:
            call(*arguments)
        assert len(str(told.value)) < 400
    resets = [
        *({"options": {"infected": odd}} for odd in (5, [infected.name], {}, 2.5, "A" * 5000, "no\0name", "~nobody/x")),
        *({"options": odd} for odd in (5, [1], "x", {"seed": 1}, {5: 1})),
        *({"seed": odd} for odd in ("x", -1, 2.5, [1])),
    ]
    for wrong in resets:
        with pytest.raises((BackdoorGymError, gym.error.Error)):
            env.reset(**{"seed": 7, **wrong})
    assert not env.gave(None)
    assert not env.gave({"nodes": 1})
    for unit in (7, 11):
        same(env.step(unit), twin.step(unit))
    same((*env.reset(),), (*twin.reset(),))
    assert env.np_random.random() == twin.np_random.random()


def test_a_model_that_cannot_be_begun_leaves_the_episode_as_it_was(infected, plain_infected, monkeypatch):
    env, twin = (BackdoorPruneEnv([infected, plain_infected], accuracy_budget=None) for _ in range(2))
    for each in (env, twin):
        each.reset(seed=0, options={"infected": infected})
        each.step(3)

    begin = MaskedModel.begin

    def fails(prepared, *rest):
        if prepared.name == plain_infected.name:
            raise DataError("no room")
        return begin(prepared, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(MaskedModel, "begin", fails)
        with pytest.raises(DataError, match="no room"):
            env.reset(seed=5, options={"infected": plain_infected})
    same(env.step(4), twin.step(4))
    assert env.np_random_seed == twin.np_random_seed


def test_an_episode_that_is_over_takes_no_step(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, max_steps=2)
    for last in (env.action_space.n - 1, None):
        env.reset(seed=0)
        if last is not None:
            assert env.step(last)[2]
        else:
            env.step(0)
            assert env.step(1)[3]
        with pytest.raises(gym.error.ResetNeeded, match="over"):
            env.step(0)
        env.observe()
    without = env.session.figures
    worth, whole = env.session.restore(0, env.worth), env.session.figures
    assert worth == pytest.approx(without.suspected_danger - whole.suspected_danger + 2 * (whole.acc - without.acc))


@pytest.mark.parametrize("gives", ["much", None, float("nan"), float("inf"), [1]])
def test_rewards_are_finite_numbers(infected, gives):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, reward=lambda transition: gives)
    before, _ = env.reset(seed=0)
    with pytest.raises(DataError, match="finite number"):
        env.step(0)
    assert not env.session.state.pruned.any()
    assert all(np.array_equal(value, before[key]) for key, value in env.observe().items())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("infected", (5, None, [], {}, [5], b"x", "A" * 5000)),
        ("reward", (5, None, "x", [])),
        ("accuracy_budget", ("a", -1, 2, float("nan"), [], True)),
        ("max_steps", ("x", 0, -1, 2.5, float("nan"), float("inf"), [])),
        ("max_failures", (None, 0, "x")),
        ("step_cost", ("x", None, float("nan"), float("inf"))),
        ("failure_cost", ("x", None, float("nan"))),
        ("residual", (5, None, [], "A" * 5000)),
        ("connections", (None, -1, 10**12)),
        ("similar", (None, "x", 10**12)),
        ("gradients_every", (0, None, float("inf"))),
        ("max_units", (0, -1, "x", 10**12, MOST_UNITS + 1)),
        ("clean_samples", (0, "x")),
        ("score_samples", (-1, "x", None)),
        ("data", (5, [])),
        ("device", (None, 5, "gpu", "A" * 10**5, [])),
        ("render_mode", (5, [], "x")),
        ("fill", ("avg", None, 5, [], "A" * 5000)),
    ],
)
def test_arguments_of_wrong_types(infected, name, values):
    for value in values:
        with pytest.raises((BackdoorGymError, gym.error.Error)) as told:
            BackdoorPruneEnv(**{"infected": infected, name: value})
        assert len(str(told.value)) < 600
    with pytest.raises((BackdoorGymError, gym.error.Error)):
        gym.make("BackdoorPrune-v0", **{"infected": infected, name: values[0]})


WRONG_ACTIONS = (
    None, 5, [0], [0, 1, 2], [0, -1], [0, 10**9], [0.0, 1.0], [0, float("nan")], "ab", ["a", "b"], {}, [None, None], [[0], [1]],
    np.zeros((2, 2), int), np.array([0.0, 1.0]), object(), [True, False],
)  # fmt: skip


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vectors_step_all_or_none(infected, mode):
    env, twin = (
        BackdoorPruneVectorEnv(2, autoreset_mode=mode, infected=infected, accuracy_budget=None) for _ in range(2)
    )
    with pytest.raises(gym.error.ResetNeeded):
        env.step([0, 1])
    with pytest.raises(gym.error.ResetNeeded):
        env.call("observe")
    with pytest.raises(gym.error.ResetNeeded):
        env.get_attr("session")
    env.reset(seed=1)
    twin.reset(seed=1)
    for actions in WRONG_ACTIONS:
        with pytest.raises(gym.error.InvalidAction):
            env.step(actions)
    for seed in ("x", [1], [1, "x"], [1, -1], 2.5, -1, [1, 2, 3], {}):
        with pytest.raises(DataError):
            env.reset(seed=seed)
    masks = (5, [True, False], np.array([True]), np.array([False, False]), np.array([1, 0]))
    for options in (5, [1], {"infected": 5}, {"x": 1}, *({"reset_mask": mask} for mask in masks)):
        with pytest.raises(BackdoorGymError):
            env.reset(options=options)
    ours, theirs = env.step([3, 4]), twin.step([3, 4])
    assert np.array_equal(ours[1], theirs[1])
    assert all(np.array_equal(ours[0][key], theirs[0][key]) for key in ours[0])
    env.step([env.single_action_space.n - 1, 5])
    if mode is AutoresetMode.DISABLED:
        with pytest.raises(gym.error.ResetNeeded):
            env.step([0, 6])
    else:
        env.step([0, 6])
    for each in (env, twin):
        each.close()


@pytest.mark.parametrize(("name", "value"), [("num_envs", "x"), ("num_envs", 10**12), ("autoreset_mode", "never")])
def test_vectors_of_wrong_arguments(infected, name, value):
    with pytest.raises(BackdoorGymError):
        BackdoorPruneVectorEnv(**{"infected": infected, name: value})


def test_layers_step_all_or_none(infected):
    env, twin = (BackdoorPruneLayersEnv(infected, accuracy_budget=None) for _ in range(2))
    for actions in (None, 5, {}, {"a": 1}, []):
        with pytest.raises(gym.error.ResetNeeded):
            env.step(actions)
    with pytest.raises(gym.error.ResetNeeded):
        env.state()
    for agent in (None, 5, [], "none"):
        for space in (env.action_space, env.observation_space):
            with pytest.raises(UnknownNameError, match="unknown agent"):
                space(agent)
    env.reset(seed=0)
    twin.reset(seed=0)
    first = dict.fromkeys(env.agents, 0)
    wrong = [{**first, env.agents[0]: odd} for odd in (-1, "x", float("nan"), None, True, 10**6)]
    for actions in (None, 5, {}, [], "x", {**first, "none": 1}, *wrong):
        with pytest.raises(BackdoorGymError):
            env.step(actions)
    for arguments in ({"options": 5}, {"options": "x"}, {"seed": "x"}):
        with pytest.raises((BackdoorGymError, gym.error.Error)):
            env.reset(**arguments)
    assert env.step(first)[1] == twin.step(first)[1]
    env.step({agent: env.action_space(agent).n - 1 for agent in env.agents})
    assert env.step({}) == ({}, {}, {}, {}, {})
    with pytest.raises(gym.error.ResetNeeded, match="over"):
        env.step(first)


def test_errors_are_where_the_package_is():
    assert backdoor_gym.DataError is DataError
    assert issubclass(backdoor_gym.UntraceableError, backdoor_gym.BackdoorGymError)
