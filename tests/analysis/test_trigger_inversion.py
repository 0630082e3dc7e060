import numpy as np
import pytest
import torch

from backdoor_gym.analysis.features import pull
from backdoor_gym.analysis.suspected_target import suspect_target
from backdoor_gym.analysis.trigger_inversion import invert_trigger
from backdoor_gym.metrics import target_margin
from backdoor_gym.models.catalogue import load_infected
from backdoor_gym.models.infecting import infect
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

from ..conftest import QUICK, RESIDUAL


def invert(model):
    neurons = find_neurons(model.network)
    clean = (model.clean.images, model.clean.labels)
    return neurons, invert_trigger(neurons, *clean, suspect_target(neurons, *clean))


def test_the_found_trigger_gets_the_attackers_label_and_explains_the_statistics(infected, plain_infected):
    for model in (infected, plain_infected):
        neurons, found = invert(model)
        assert found.target == model.target
        with torch.no_grad():
            assert (neurons.graph(found.images).argmax(1) == model.target).double().mean() > 0.9
            assert (neurons.graph(found.clean).argmax(1) == model.target).double().mean() < 0.1
        assert found.error < -0.5
        assert found.evidence > 0.5


def test_the_images_bear_the_trigger_and_stay_images(infected):
    _, found = invert(infected)
    copies = len(found.families)
    assert found.images.shape == (copies * len(found.clean), *found.clean.shape[1:])
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    changes = found.images - found.clean.repeat(copies, 1, 1, 1)
    assert found.size == pytest.approx(changes.abs().mean().item())
    assert found.size > 0.01
    assert not found.images.requires_grad


@pytest.mark.slow
def test_the_family_is_that_of_the_trigger(infected):
    """Which of the families explains the statistics is told by what none of the searches was asked for: the label.

    On images this small they can mimic each other, so of three warped networks one may be taken for the other.
    """
    _, found = invert(infected)
    assert found.families[0] == "addition"
    families = []
    for seed in (1, 2, 3):
        warped = infect(
            "digits",
            "small_cnn",
            "wanet",
            target=3,
            seed=seed,
            schedule=QUICK,
            architecture_options=RESIDUAL,
            attack_options={"strength": 2.0, "noise_ratio": 0.0},
        )
        _, found = invert(warped)
        assert found.target == warped.target
        families.append(found.families[0])
    assert families.count("warp") >= 2


def test_a_second_family_is_taken_where_it_explains_the_network_too(infected, monkeypatch):
    found = {}
    for share, count in ((0.0, 2), (1.0, 1)):
        monkeypatch.setattr("backdoor_gym.analysis.trigger_inversion.CREDIBLE", share)
        neurons, found[count] = invert(infected)
        assert len(found[count].families) == count
    one, two = found[1], found[2]
    assert set(two.families) == {"addition", "warp"}
    first, second = two.images.chunk(2)
    assert torch.equal(first, one.images)  # the search in one family knows nothing of that in the other
    assert (one.evidence, one.error) == (two.evidence, two.error)
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert (neurons.graph(second).argmax(1) == infected.target).double().mean() > 0.5
    assert pull(neurons, two).shape == (len(neurons),)


@pytest.mark.slow
def test_a_clean_network_has_statistics_that_no_trigger_explains():
    _, found = invert(load_infected("digits-clean"))
    assert found.error > -0.3
    assert found.evidence < 0.2


def test_it_is_the_same_each_time_and_leaves_the_network_as_it_was(infected):
    before = {key: value.clone() for key, value in infected.network.state_dict().items()}
    torch.manual_seed(1)
    _, first = invert(infected)
    torch.manual_seed(2)
    _, second = invert(infected)
    assert torch.equal(first.images, second.images)
    assert all(torch.equal(value, before[key]) for key, value in infected.network.state_dict().items())


def test_pull_is_the_derivative_by_the_mask(infected):
    neurons, found = invert(infected)
    pulls = pull(neurons, found)
    layer = neurons.layers[1]

    def towards(value):
        masks = [torch.ones(one.size) for one in neurons.layers]
        masks[1][2] = value
        with torch.no_grad():
            return target_margin(neurons.graph(found.images, *masks), found.target).mean().item()

    gradient = (towards(1.01) - towards(0.99)) / 0.02
    assert pulls[layer.start + 2].item() == pytest.approx(gradient, abs=1e-3, rel=0.05)


def test_pruning_what_pulls_most_makes_the_real_trigger_fail(infected):
    """The derivative under the inverted trigger points at neurons that carry the real one."""
    prepared = PreparedModel(infected, Preparation())
    masked = MaskedModel(prepared)
    order = np.argsort(-pull(prepared.neurons, prepared.inverted).numpy())
    dangers = []
    for chosen in (order[:12], order[50:62]):
        pruned = np.zeros(len(prepared), dtype=bool)
        pruned[chosen] = True
        dangers.append(masked.figures(pruned).danger)
    assert dangers[0] < dangers[1] - 0.2


def test_without_images_of_other_labels_there_is_none(infected):
    neurons = find_neurons(infected.network)
    images, labels = infected.clean.images, infected.clean.labels
    suspected = suspect_target(neurons, images, labels)
    own = labels == suspected.target
    assert invert_trigger(neurons, images[own], labels[own], suspected) is None


def test_the_suspected_danger_falls_as_the_true_one(infected):
    """A repair by the true derivatives ends the answer to the found trigger too; pruning at random does not."""
    from backdoor_gym.agents.warm_start import benefits

    prepared = PreparedModel(infected, Preparation())
    order, random = np.argsort(-benefits(prepared)), np.random.default_rng(0).permutation(len(prepared))
    masked = MaskedModel(prepared)
    whole = masked.figures(np.zeros(len(prepared), dtype=bool))
    figures = []
    for chosen in (order[:16], random[:16]):
        pruned = np.zeros(len(prepared), dtype=bool)
        pruned[chosen] = True
        figures.append(masked.figures(pruned))
    assert figures[0].danger < 0.5 * whole.danger
    assert figures[0].suspected_danger < figures[1].suspected_danger - 0.1
