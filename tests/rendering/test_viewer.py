import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

import backdoor_gym
from backdoor_gym.rendering.drawing import HEIGHT, WIDTH, Snapshot


def make(infected, mode):
    env = gym.make("BackdoorPrune-v0", infected=infected, render_mode=mode, accuracy_budget=None)
    env.reset(seed=0)
    return env


@pytest.mark.slow
def test_frames_have_one_size_and_show_a_prune(infected, plain_infected):
    env = make(infected, "rgb_array")
    before = env.render()
    assert before.shape == (HEIGHT, WIDTH, 3)
    assert before.dtype == np.uint8
    assert np.array_equal(before, env.render())
    env.step(5)
    assert not np.array_equal(before, env.render())
    assert make(plain_infected, "rgb_array").render().shape == before.shape


def test_text_has_a_line_for_each_layer_and_marks_what_is_pruned(infected):
    env = make(infected, "ansi")
    env.step(5)
    lines = env.render().splitlines()
    assert lines[0] == "tiny: 1 of 112 neurons pruned"
    assert lines[1].startswith("ACC ")
    assert "ASR" in lines[1]
    assert "suspected danger" in lines[1]
    assert len(lines) == 2 + 7
    assert lines[2].split()[0] == "stem.0"
    assert lines[2].split()[-1].index("X") == 5


@pytest.mark.slow
def test_human_mode_does_not_hang_without_a_screen(infected_file):
    code = (
        "import gymnasium as gym, backdoor_gym\n"
        f"env = gym.make('BackdoorPrune-v0', infected={str(infected_file)!r}, render_mode='human')\n"
        "env.reset(seed=0); env.step(3); print(env.render()); env.close()"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "MPLCONFIGDIR": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"
    assert "needs a screen" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
def test_agents_of_layers_see_the_same_drawing(infected, mode):
    single, layers = make(infected, mode), backdoor_gym.parallel_env(infected=infected, render_mode=mode)
    layers.reset(seed=0)
    layers = layers.unwrapped
    layers.single.accuracy_budget = None
    actions = {agent: len(units) for agent, units in layers.units.items()}
    first = layers.possible_agents[0]
    layers.step({**actions, first: 2})
    single.step(int(layers.units[first][2]))
    assert np.array_equal(layers.render(), single.render())


def test_what_is_drawn_is_what_happened(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, accuracy_budget=0.0).unwrapped
    env.reset(seed=0)
    while not env.step(int(np.flatnonzero(env.action_masks())[0]))[2]:
        pass
    drawn = Snapshot.of(env.session)
    assert drawn.undone.sum() == env.max_failures
    assert np.array_equal(drawn.pruned, env.session.state.pruned)
    assert not drawn.pruned[drawn.undone].any()
    assert np.flatnonzero(drawn.latest).tolist() == np.flatnonzero(drawn.pruned)[-1:].tolist()
    assert len(drawn.acc) == len(drawn.danger) == len(drawn.asr) == 1 + drawn.pruned.sum()
    assert drawn.least_acc == pytest.approx(drawn.acc[0])


def test_suspicion_is_the_most_that_a_neuron_stands_out_by(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, residual="group").unwrapped
    env.reset(seed=0)
    drawn, prepared = Snapshot.of(env.session), env.session.prepared
    for unit, features in zip(prepared.units, prepared.features, strict=True):
        assert set(drawn.suspicion[unit]) == {max(features[0], features[1], features[8])}
    assert drawn.strengths.max() == 1
    stem = prepared.neurons.layers[0]
    weight = infected.network.get_submodule(stem.feeders[0].module).weight.detach()
    expected = weight.abs().sum((1, 2, 3)) / weight.abs().sum((1, 2, 3)).max()
    np.testing.assert_allclose(drawn.strengths[stem.neurons], expected.numpy(), rtol=1e-5)


def test_rendering_needs_a_mode(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected).unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
