from collections import Counter

import numpy as np
import pytest
import torch

from backdoor_gym.data.datasets import DataSource, LabelledImages
from backdoor_gym.models import world_family
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.networks import build_from_spec
from backdoor_gym.neurons.finding import find_neurons


def recipes(split, count=400):
    return [world_family.recipe(split, seed) for seed in range(count)]


@pytest.mark.parametrize("split", world_family.SPLITS)
def test_recipes_are_various(split):
    drawn = recipes(split)
    assert 160 < sum(recipe.attack == "clean" for recipe in drawn) < 240
    assert {recipe.data.name for recipe in drawn} == {data.name for data in world_family.DATA}
    norms = Counter(recipe.architecture.get("norm") for recipe in drawn)
    assert min(norms[norm] for norm in ("none", "group", "layer")) > 15
    statistics = Counter(recipe.statistics for recipe in drawn)
    assert min(statistics["recomputed"], statistics["folded"]) > 15
    assert any(recipe.target == "all-to-all" for recipe in drawn)
    assert {recipe.schedule.optimizer for recipe in drawn} == {"sgd", "adam"}
    rates = [recipe.poison_rate for recipe in drawn if recipe.attack == "badnets"]
    assert min(rates) < 0.01 < 0.15 < max(rates)
    assert any(recipe.finetune for recipe in drawn)


def test_some_attacks_and_one_kind_of_network_occur_in_tests_alone():
    learned = recipes("world-train") + recipes("world-val")
    tested = recipes("world-test-a") + recipes("world-test-b")
    for attack in ("input-aware", "label-consistent"):
        assert not any(recipe.attack == attack for recipe in learned)
        assert sum(recipe.attack == attack for recipe in tested) > 10
    assert not any(recipe.architecture["name"] == "densenet" for recipe in learned)
    assert sum(recipe.architecture["name"] == "densenet" for recipe in tested) > 40


def test_attempts_share_what_makes_a_network_easy_or_hard():
    for seed in range(60):
        first, later = (world_family.recipe("world-train", seed, attempt) for attempt in (0, 5))
        for name in ("data", "architecture", "attack", "statistics"):
            assert getattr(first, name) == getattr(later, name)
        assert first.seed != later.seed
        assert later.poison_rate >= 0.1


@pytest.mark.slow
def test_networks_are_built_and_have_at_most_the_declared_number_of_neurons():
    for seed in range(60):
        drawn = world_family.recipe("world-test-a", seed)
        channels = drawn.data.channels
        network = build_from_spec({**drawn.architecture, "num_classes": drawn.data.classes, "in_channels": channels})
        example = torch.rand(2, channels, drawn.data.size, drawn.data.size)
        neurons = find_neurons(network.eval(), example)
        assert 0 < len(neurons) <= world_family.MAX_NEURONS
        assert network(example).shape == (2, drawn.data.classes)


@pytest.mark.parametrize("block", ["plain", "residual", "inverted"])
def test_a_folded_network_gives_the_same_logits(block):
    spec = {"name": "cnn", "num_classes": 10, "in_channels": 1, "width": 8, "block": block, "image_size": 8}
    network = build_from_spec(spec)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    network(images)  # statistics of its own
    model = InfectedModel(network.eval(), LabelledImages(images, labels), architecture=spec)
    folded = world_family.folded(model)
    assert folded.architecture == {**spec, "norm": "none"}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.network.modules())
    torch.testing.assert_close(folded.network(images), network(images))


def test_the_defender_holds_few_or_many_images_of_classes_that_may_be_unequal_or_missing():
    source = DataSource("digits", "all", tuple(range(1000)))
    held = LabelledImages.from_source(source)
    counts, missing = [], 0
    for seed in range(60):
        chosen = world_family.held_by_defender(held, np.random.default_rng(seed))
        assert len(set(chosen.source.indices)) == len(chosen)
        assert set(chosen.source.indices) <= set(source.indices)
        counts.append(len(chosen))
        missing += len(chosen) > 300 and len(chosen.labels.unique()) < 10
    assert min(counts) < 70
    assert max(counts) > 800
    assert missing > 2


def test_one_model_is_really_made(monkeypatch):
    monkeypatch.setattr(
        world_family,
        "recipe",
        lambda split, seed, attempt=0: world_family.Recipe(
            world_family.DATA[0],
            {"name": "cnn", "width": 16, "stages": 1, "blocks": 2, "image_size": 8},
            "badnets",
            {"size": 3, "colour": [1.0]},
            4,
            0.1,
            world_family.Schedule(epochs=8, batch_size=32, learning_rate=0.05, augment=False),
            None,
            900,
            "folded",
            attempt,
        ),
    )
    model = world_family.make("world-val", 0)
    assert model.facts["acc"] >= 0.9
    assert model.facts["asr"] >= 0.9
    assert model.facts["statistics"] == "folded"
    assert model.architecture["norm"] == "none"
    assert model.evaluate().asr == pytest.approx(model.facts["asr"], abs=0.01)
    assert not set(model.clean.source.indices) & set(model.test.source.indices)
