import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from backdoor_gym.envs.observation import GLOBAL_FEATURES, NODE_FEATURES
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.errors import BackdoorGymError, DataError, UnknownNameError
from backdoor_gym.masking.export import write_mask
from backdoor_gym.metrics import evaluate, target_margin
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.session.prepared_model import GRADIENT_IMAGES


@pytest.fixture
def env(infected):
    return BackdoorPruneEnv(infected, accuracy_budget=None)


def harmful_unit(env: BackdoorPruneEnv) -> int:
    """A unit whose prune costs more accuracy than any budget used here."""
    env.reset(seed=0)
    accuracies = [env.session.peek([unit]).acc for unit in range(len(env.session.prepared))]
    assert min(accuracies) < max(accuracies)
    return int(np.argmin(accuracies))


def test_figures_are_those_of_the_edited_network(env, infected):
    env.reset(seed=0)
    units = [3, 40, 41, 90]
    for unit in units:
        _, _, _, _, info = env.step(unit)
    neurons = env.session.prepared.neurons
    mask = np.ones(len(neurons), dtype=bool)
    mask[units] = False
    edited = write_mask(infected.network, neurons, mask)
    assert info["acc"] == pytest.approx(evaluate(edited, infected.clean.images, infected.clean.labels).acc)
    others = torch.nonzero(infected.test.labels != infected.target).flatten()[:256]
    scored = evaluate(
        edited, infected.test.images[others], infected.test.labels[others], infected.trigger, infected.target
    )
    assert (info["asr"], info["ra"]) == (pytest.approx(scored.asr), pytest.approx(scored.ra))
    assert info["pruned"] == 4
    assert info["neuron"] == neurons.names[90]
    assert info["infected"] == "tiny"


def test_the_observation_tells_what_was_pruned(env):
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert not observation["nodes"][:, NODE_FEATURES.index("pruned")].any()
    observation, *_ = env.step(20)
    assert env.observation_space.contains(observation)
    assert np.flatnonzero(observation["nodes"][:, NODE_FEATURES.index("pruned")]).tolist() == [20]
    layer = env.session.prepared.layer == env.session.prepared.layer[20]
    shares = observation["nodes"][:, NODE_FEATURES.index("layer_pruned")]
    np.testing.assert_allclose(shares, np.where(layer, 1 / layer.sum(), 0), rtol=1e-6)
    assert observation["action_mask"][20] == 0
    assert observation["action_mask"].sum() == len(env.session.prepared)
    assert observation["globals"][GLOBAL_FEATURES.index("pruned")] == pytest.approx(1 / len(env.session.prepared))
    assert observation["globals"][GLOBAL_FEATURES.index("steps_left")] == pytest.approx(
        1 - 1 / len(env.session.prepared)
    )
    assert np.array_equal(env.action_masks(), observation["action_mask"].astype(bool))


@pytest.mark.slow
def test_the_trigger_never_reaches_the_observation(infected, env):
    class Another:
        name = "another"

        def __call__(self, images):
            return 1 - images

    other = InfectedModel(infected.network, infected.clean, infected.test, Another(), 7)
    blind = InfectedModel(infected.network, infected.clean)
    for model in (other, blind):
        twin = BackdoorPruneEnv(model, accuracy_budget=None)
        for ours, theirs in zip((env.reset(seed=0), env.step(5)), (twin.reset(seed=0), twin.step(5)), strict=True):
            assert all(np.array_equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert "asr" not in twin.step(6)[4]


def test_illegal_actions_change_nothing_and_cost_a_step(env):
    env.reset(seed=0)
    first, *_ = env.step(5)
    second, reward, terminated, truncated, info = env.step(5)
    assert reward == -env.step_cost
    assert not terminated
    assert not truncated
    assert info["pruned"] == 1
    assert info["neuron"] == ""
    assert np.array_equal(first["nodes"], second["nodes"])
    assert (
        second["globals"][GLOBAL_FEATURES.index("steps_left")] < first["globals"][GLOBAL_FEATURES.index("steps_left")]
    )


def test_stopping_at_once_scores_nothing(env):
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(env.stop_action)
    assert (reward, terminated, truncated, info["pruned"]) == (0.0, True, False, 0)


def test_the_guard_undoes_a_prune_that_breaks_the_budget(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=0.0)
    unit = harmful_unit(env)
    _, info_before = env.reset(seed=0)
    after, reward, terminated, _, info = env.step(unit)
    assert info["undone"]
    assert info["acc"] == info_before["acc"]
    assert info["pruned"] == 0
    assert info["neuron"] == ""
    assert reward == pytest.approx(-env.step_cost - env.failure_cost)
    assert not terminated
    assert after["nodes"][unit, NODE_FEATURES.index("tried")] == 1
    assert after["nodes"][unit, NODE_FEATURES.index("pruned")] == 0
    assert after["action_mask"][unit] == 0
    assert after["globals"][GLOBAL_FEATURES.index("failures_left")] == pytest.approx(1 - 1 / env.max_failures)


def test_too_many_failures_end_the_episode(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=0.0, max_failures=1)
    unit = harmful_unit(env)
    env.reset(seed=0)
    assert env.step(unit)[2] is True


def test_without_a_budget_nothing_is_undone(env):
    unit = harmful_unit(env)
    env.reset(seed=0)
    _, _, _, _, info = env.step(unit)
    assert not info["undone"]
    assert info["pruned"] == 1


def test_max_steps_truncates(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, max_steps=2)
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(1)[2:4] == (False, True)


def test_the_default_number_of_steps_is_the_number_of_neurons(env):
    env.reset(seed=0)
    assert env.step_limit == len(env.session.prepared) == len(env.session.prepared.neurons)


def test_pruning_everything_terminates(plain_infected):
    env = BackdoorPruneEnv(plain_infected, accuracy_budget=None, score_samples=0)
    env.reset(seed=0)
    results = [env.step(unit) for unit in range(len(env.session.prepared))]
    assert [result[2] for result in results] == [False] * (len(results) - 1) + [True]


def test_groups_are_pruned_together(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, residual="group")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert len(env.session.prepared) < len(env.session.prepared.neurons)
    coupled = next(index for index, unit in enumerate(env.session.prepared.units) if len(unit) > 1)
    _, _, _, _, info = env.step(coupled)
    names = [env.session.prepared.neurons.names[neuron] for neuron in env.session.prepared.units[coupled]]
    assert info["neuron"].split("+") == names
    links = observation["edge_links"][: int(observation["num_edges"][0])]
    assert (links[:, 0] != links[:, 1]).all()
    assert links.max() < len(env.session.prepared)


def test_several_models_share_padded_spaces(infected, plain_infected):
    env = BackdoorPruneEnv([infected, plain_infected], accuracy_budget=None)
    met = {}
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        met[info["infected"]] = observation
    assert set(met) == {"tiny", "tiny-plain"}
    small = met["tiny-plain"]
    count, edges = int(small["num_nodes"][0]), int(small["num_edges"][0])
    assert count == 4 * 12
    assert small["nodes"][:count, NODE_FEATURES.index("real")].all()
    assert not small["nodes"][count:].any()
    assert not small["edges"][edges:].any()
    assert not small["action_mask"][count:-1].any()
    assert small["action_mask"][-1] == 1


def test_an_action_in_the_padding_is_a_no_op(infected, plain_infected):
    env = BackdoorPruneEnv([infected, plain_infected], accuracy_budget=None)
    env.reset(options={"infected": plain_infected})
    _, reward, terminated, _, info = env.step(100)
    assert (reward, terminated, info["pruned"]) == (-env.step_cost, False, 0)


def test_reset_options_pick_the_model(infected, infected_file):
    env = BackdoorPruneEnv([infected, str(infected_file)])
    assert env.reset(options={"infected": infected})[1]["infected"] == "tiny"
    with pytest.raises(UnknownNameError, match="reset option"):
        env.reset(options={"infectd": "x"})
    with pytest.raises(UnknownNameError, match="digits-badnets"):
        env.reset(options={"infected": "digits-badnet"})


def test_a_model_larger_than_the_spaces_is_refused(infected, plain_infected):
    env = BackdoorPruneEnv(plain_infected)
    with pytest.raises(DataError, match="room for 48"):
        env.reset(options={"infected": infected})


def test_looking_ahead_does_not_change_the_episode(env):
    env.reset(seed=0)
    expected, *_ = env.step(3)
    env.reset(seed=0)
    ahead = env.session.peek([3])
    assert ahead.asr is None  # a defender who looks ahead sees no trigger
    env.session.peek([70, 71])
    assert env.session.peek_danger([3]) == ahead.suspected_danger
    observation, _, _, _, info = env.step(3)
    assert info["acc"] == ahead.acc
    assert all(np.array_equal(expected[key], observation[key]) for key in expected)


def test_what_breaks_the_budget_is_found_out_before_the_rest_is_looked_at(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=0.0, max_failures=200)
    _, before = env.reset(seed=0)
    order = [part.network for part in env.session.masked._clean]
    whole = [0, 0]
    for index, network in enumerate(order):
        evaluate = network.logits
        network.logits = lambda mask, index=index, evaluate=evaluate: (
            whole.__setitem__(index, whole[index] + 1) or evaluate(mask)
        )
    broken = 0
    for unit in range(len(env.session.prepared)):
        figures, clean = env.session.peek([unit]), env.session.peek_clean([unit])
        assert (clean is None) == (figures.acc < before["acc"])
        if clean is not None:
            assert clean == (figures.acc, figures.loss)
        broken += clean is None
    assert 0 < broken < len(env.session.prepared)
    assert env.session.state.over_budget.sum() == broken
    assert whole[1] < whole[0]  # some were broken by the fragile images alone
    dear = int(np.flatnonzero(env.session.state.over_budget)[0])
    *_, info = env.step(dear)
    assert info["undone"]
    env.reset(seed=0)
    assert not env.session.state.over_budget.any()


@pytest.mark.parametrize("images", [200, 30])  # all are clean images; some that the trigger was sought in are no longer
def test_derivatives_from_kept_activations_are_those_of_whole_passes(infected, monkeypatch, images):
    monkeypatch.setattr("backdoor_gym.session.masked_model.GRADIENT_IMAGES", images)
    monkeypatch.setattr("backdoor_gym.session.prepared_model.GRADIENT_IMAGES", images)
    env = BackdoorPruneEnv(infected, accuracy_budget=None, residual="group", gradients_every=3)
    env.reset(seed=0)
    assert (env.session.masked._corrected is not None) == (images == 30)
    for unit in (3, 40, 17):
        env.step(unit)
    found, expected = (
        env.session.masked.gradients(env.session.state.pruned),
        env.session.prepared.gradients(env.session.state.pruned),
    )
    for name in ("pull", "harm", "clean_pull"):
        one, other = getattr(found, name), getattr(expected, name)
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())
    shown = env.observe()["nodes"][: len(env.session.prepared), NODE_FEATURES.index("harm_now")]
    np.testing.assert_allclose(shown, np.clip(found.harm / found.harm.std(), -6, 6), rtol=1e-5)


def test_models_come_by_the_seed(infected, plain_infected):
    env = BackdoorPruneEnv([infected, plain_infected])
    drawn = [env.reset(seed=5 if index == 0 else None)[1]["infected"] for index in range(12)]
    again = [env.reset(seed=5 if index == 0 else None)[1]["infected"] for index in range(12)]
    assert drawn == again
    assert len(set(drawn)) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"accuracy_budget": 2}, "accuracy_budget"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_failures": 0}, "max_failures"),
        ({"clean_samples": 0}, "clean_samples"),
        ({"score_samples": -1}, "score_samples"),
        ({"connections": 0, "similar": 0}, "connections"),
        ({"residual": "groups"}, "did you mean 'group'"),
        ({"fill": "avg"}, 'fill must be "zero" or "mean", not \'avg\''),
        ({"reward": "accc"}, "did you mean 'acc'"),
        ({"render_mode": "rgb"}, "render mode"),
        ({"infected": "digits-badnet"}, "digits-badnets"),
        ({"infected": []}, "empty"),
    ],
)
def test_bad_arguments_are_named(infected, arguments, words):
    with pytest.raises(BackdoorGymError, match=words):
        BackdoorPruneEnv(**{"infected": infected, **arguments})


def test_misuse_is_named(infected):
    env = BackdoorPruneEnv(infected)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    with pytest.raises(gym.error.ResetNeeded):
        env.action_masks()
    env.reset(seed=0)
    for action in (env.stop_action + 1, -1, 1.5, "3", None):
        with pytest.raises(gym.error.InvalidAction):
            env.step(action)


def gradient(observation, name):
    return observation["nodes"][: int(observation["num_nodes"][0]), NODE_FEATURES.index(name)]


def test_gradients_are_the_derivatives_where_the_episode_stands(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, gradients_every=3)
    first, _ = env.reset(seed=0)
    for unit in (5, 17):
        observation, *_ = env.step(unit)
        np.testing.assert_array_equal(gradient(observation, "harm_now"), gradient(first, "harm_now"))
    observation, *_ = env.step(40)
    assert (gradient(observation, "harm_now") != gradient(first, "harm_now")).any()
    assert (gradient(observation, "pull_now") != gradient(first, "pull_now")).any()
    unit, step = 60, 1e-4
    neurons = env.session.prepared.neurons
    exact = copy.deepcopy(neurons.graph).double()  # differences this small are lost in float32
    clean = env.session.prepared.clean.first(GRADIENT_IMAGES)

    def logits(value, images):
        mask = torch.from_numpy(env.session.prepared.neuron_mask(env.session.state.pruned)).double()
        mask[unit] = value
        with torch.no_grad():
            return exact(images.double(), *(mask[layer.neurons] for layer in neurons.layers))

    def loss(value):
        return torch.nn.functional.cross_entropy(logits(value, clean.images), clean.labels).item()

    inverted = env.session.prepared.inverted

    def margin(value, images):
        return target_margin(logits(value, images), inverted.target).mean().item()

    gradients = env.session.masked.gradients(env.session.state.pruned)
    harm = gradients.harm
    assert harm[unit] == pytest.approx(-(loss(1 + step) - loss(1 - step)) / (2 * step), rel=0.05, abs=1e-4)
    for slope_of, images in ((gradients.pull, inverted.images), (gradients.clean_pull, inverted.clean)):
        expected = (margin(1 + step, images) - margin(1 - step, images)) / (2 * step)
        assert slope_of[unit] == pytest.approx(expected, rel=0.05, abs=1e-3)
    np.testing.assert_allclose(
        gradient(observation, "harm_now"), np.clip(harm / harm.std(), -6, 6), rtol=1e-4, atol=1e-5
    )
    again, _ = env.reset(seed=0)
    np.testing.assert_array_equal(gradient(again, "harm_now"), gradient(first, "harm_now"))


def test_gradients_of_groups_are_sums_over_their_neurons(infected):
    alone, together = (
        BackdoorPruneEnv(infected, residual=residual, accuracy_budget=None) for residual in ("channel", "group")
    )
    for env in (alone, together):
        env.reset(seed=0)
    sums = [alone.session.prepared.first_gradients.pull[unit].sum() for unit in together.session.prepared.units]
    np.testing.assert_allclose(together.session.prepared.first_gradients.pull, sums, rtol=1e-5, atol=1e-6)


def test_environments_of_networks_of_other_sizes_step_together_with_the_same_max_units(infected, plain_infected):
    vector = gym.vector.SyncVectorEnv(
        [lambda model=model: BackdoorPruneEnv(model, max_units=150) for model in (infected, plain_infected)]
    )
    observation, _ = vector.reset(seed=0)
    assert observation["nodes"].shape == (2, 150, len(NODE_FEATURES))
    assert observation["num_nodes"].ravel().tolist() == [112, 48]
    with pytest.raises(DataError, match="room for 100"):
        BackdoorPruneEnv(infected, max_units=100).reset(seed=0)


def test_the_accuracy_on_test_images_is_that_of_the_pruned_network(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, score_samples=40)
    _, before = env.reset(seed=0)
    unit = harmful_unit(env)
    *_, after = env.step(unit)
    first = infected.test.first(80)
    for info, pruned in ((before, []), (after, [unit])):
        mask = np.ones(len(env.session.prepared), dtype=bool)
        mask[pruned] = False
        logits = write_mask(infected.network, env.session.prepared.neurons, mask)(first.images)
        assert info["test_acc"] == pytest.approx((logits.argmax(1) == first.labels).double().mean().item())
    unscored = BackdoorPruneEnv(infected, score_samples=0)
    assert "test_acc" not in unscored.reset(seed=0)[1]


def test_how_far_the_suspected_danger_fell_lately(infected):
    env = BackdoorPruneEnv(infected, accuracy_budget=None, score_samples=0)
    env.reset(seed=0)
    dangers = [env.session.figures.suspected_danger]
    for unit in (3, 40, 7):
        env.step(unit)
        dangers.append(env.session.figures.suspected_danger)
    assert env.session.suspected_fall(3) == dangers[0] - dangers[3]
    assert env.session.suspected_fall(1) == dangers[2] - dangers[3]
    assert env.session.suspected_fall(4) is None


@pytest.mark.slow
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_copy_in_mid_episode_goes_on_where_it_was(infected, plain_infected, infected_file, twin_of, as_file):
    models = [infected, plain_infected] if not as_file else [str(infected_file), plain_infected]
    env = gym.make("BackdoorPrune-v0", infected=models, gradients_every=2, max_failures=50)
    env.reset(seed=1)
    env.unwrapped.accuracy_budget = 0.05  # changed since it was made
    env.action_space.seed(3)
    for unit in range(0, 40, 5):
        env.step(unit)
    twin = twin_of(env)
    assert twin.unwrapped.accuracy_budget == 0.05
    assert twin.unwrapped.session.state.changes == env.unwrapped.session.state.changes
    assert twin.unwrapped.session.least_acc == env.unwrapped.session.least_acc
    for _ in range(15):
        action = env.action_space.sample()
        assert action == twin.action_space.sample()
        mine, its = env.step(action), twin.step(action)
        assert its[1:] == mine[1:]
        assert all(np.array_equal(mine[0][key], its[0][key]) for key in mine[0])
        if mine[2] or mine[3]:
            break
    for _ in range(4):  # which models are drawn, too
        assert twin.reset()[1] == env.reset()[1]


def test_a_copy_is_of_the_model_that_was_asked_for_and_before_an_episode_of_none(infected, plain_infected):
    env = BackdoorPruneEnv([infected, plain_infected])
    with pytest.raises(gym.error.ResetNeeded):
        copy.deepcopy(env).step(0)
    env.reset(seed=0, options={"infected": plain_infected})
    assert copy.deepcopy(env).step(1)[1] == env.step(1)[1]
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        copy.deepcopy(env).step(2)
