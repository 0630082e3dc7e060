"""Clean images without some class: of a clean network nothing is accused for it, and the class lives."""

from dataclasses import replace

import pytest
import torch

from backdoor_gym import load_infected, repair
from backdoor_gym.analysis.suspected_target import suspect_target
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.neurons.finding import find_neurons


@pytest.mark.parametrize(
    "missing", [7, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_clean_network_stays_as_it_is_where_a_class_is_missing(missing):
    model = load_infected("digits-clean")
    there = model.clean.labels != missing
    clean = LabelledImages(model.clean.images[there], model.clean.labels[there])
    result = repair(replace(model, clean=clean))
    assert (result.outcome, result.pruned) == ("untouched", [])
    assert result.suspected_target != missing
    of_class = model.test.labels == missing
    with torch.no_grad():
        right = (result.network(model.test.images[of_class]).argmax(1) == missing).float().mean().item()
    assert right > 0.9


def test_a_label_without_images_is_not_suspected(infected):
    there = infected.clean.labels != infected.target
    images, labels = infected.clean.images, infected.clean.labels
    neurons = find_neurons(infected.network, images[:2])
    assert suspect_target(neurons, images, labels).target == infected.target
    assert suspect_target(neurons, images[there], labels[there]).target != infected.target
