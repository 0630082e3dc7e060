import threading
from collections import Counter

import pytest
import torch

from backdoor_gym.errors import TrainingError
from backdoor_gym.models import digits_family, family
from backdoor_gym.models.catalogue import load_infected
from backdoor_gym.networks import build
from backdoor_gym.neurons.finding import find_neurons


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(family.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def quick_make(monkeypatch, infected):
    """Replaces training by a copy of a small model; counts how often it was asked for."""
    made = []

    def make(name, progress=False):
        made.append(name)
        return infected

    monkeypatch.setattr(family, "make", make)
    return made


def test_recipes_are_balanced_and_independent():
    recipes = [digits_family.recipe("digits-train", seed) for seed in range(1000)]
    attacks = Counter(recipe.attack for recipe in recipes)
    assert set(attacks) == {"badnets", "blended", "sig", "wanet", "clean"}
    assert min(attacks.values()) > 150
    shapes = Counter((recipe.attack, recipe.shape) for recipe in recipes)
    assert len(shapes) == 15
    assert min(shapes.values()) > 35
    for shape in ("plain", "residual", "preact"):  # what is drawn later does not follow from what was drawn before
        mine = [recipe for recipe in recipes if recipe.shape == shape]
        assert {recipe.target for recipe in mine} == set(range(10))
        ratios = [recipe.attack_options["ratio"] for recipe in mine if recipe.attack == "blended"]
        assert min(ratios) < 0.17 < 0.28 < max(ratios)
        assert {recipe.attack_options["size"] for recipe in mine if recipe.attack == "badnets"} == {2, 3}


def test_splits_and_attempts_draw_other_models():
    drawn = {split: [digits_family.recipe(split, seed).seed for seed in range(300)] for split in digits_family.SPLITS}
    assert len(set().union(*drawn.values())) == 900
    first, second = (digits_family.recipe("digits-train", 3, attempt) for attempt in (0, 1))
    fixed = ("attack", "shape", "width", "blocks")
    assert [getattr(first, name) for name in fixed] == [getattr(second, name) for name in fixed]
    assert first.seed != second.seed


@pytest.mark.slow
def test_networks_have_the_declared_number_of_neurons():
    for seed in range(40):
        drawn = digits_family.recipe("digits-val", seed)
        network = build("small_cnn", 10, 1, width=drawn.width, blocks=drawn.blocks, shape=drawn.shape)
        assert digits_family.MIN_NEURONS <= len(find_neurons(network)) <= digits_family.MAX_NEURONS


def test_a_model_is_made_once_and_then_read(cache, quick_make):
    first = load_infected("digits-train/7")
    second = load_infected("digits-train/7")
    assert quick_make == ["digits-train/7"]
    assert all((first.network.state_dict()[key] == value).all() for key, value in second.network.state_dict().items())


@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"x" * 9, lambda data: b""]
)
def test_a_damaged_file_is_made_again(cache, quick_make, spoil):
    load_infected("digits-val/1")
    path = family.cache_path("digits-val/1")
    path.write_bytes(spoil(path.read_bytes()))
    load_infected("digits-val/1")
    assert len(quick_make) == 2
    load_infected("digits-val/1")
    assert len(quick_make) == 2


def test_several_at_once_make_it_once(cache, quick_make):
    threads = [threading.Thread(target=load_infected, args=("digits-test/5",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quick_make == ["digits-test/5"]


def test_names():
    assert family.is_member("digits-train/0")
    assert family.is_member("digits-test/12345")
    for name in ("digits-train/", "digits-train/-1", "digits-train/1.5", "digits/1", "digits-train", "digits-train/²"):
        assert not family.is_member(name)


def test_a_weak_network_is_drawn_again_with_the_same_shape(monkeypatch, infected):
    seen = []

    def infect(*arguments, **options):
        seen.append((arguments[2], options["architecture_options"], options["seed"]))
        infected.facts["acc"] = 0.99 if len(seen) == 3 else 0.5
        return infected

    facts = dict(infected.facts)
    monkeypatch.setattr(digits_family, "infect", infect)
    seed = next(seed for seed in range(20) if digits_family.recipe("digits-train", seed).attack == "badnets")
    model = family.make(f"digits-train/{seed}")
    assert model.facts["attempt"] == 2
    assert len({(attack, tuple(options.items())) for attack, options, _ in seen}) == 1
    assert len({seed for *_, seed in seen}) == 3
    infected.facts["acc"] = 0.5
    monkeypatch.setattr(digits_family, "infect", lambda *_, **__: infected)
    with pytest.raises(TrainingError, match="20 attempts"):
        family.make(f"digits-train/{seed}")
    infected.facts.clear()
    infected.facts.update(facts)


@pytest.mark.slow
def test_one_model_is_really_made(cache):
    seed = min(
        range(60),
        key=lambda seed: (
            digits_family.recipe("digits-val", seed).width * digits_family.recipe("digits-val", seed).blocks
        ),
    )
    model = load_infected(f"digits-val/{seed}")
    drawn = digits_family.recipe("digits-val", seed, model.facts["attempt"])
    assert model.facts["acc"] >= digits_family.MIN_ACC
    assert drawn.attack == model.facts["attack"]
    if drawn.attack == "clean":
        assert model.trigger is None
        assert model.target is None
    else:
        assert model.facts["asr"] >= digits_family.MIN_ASR
        assert model.target == drawn.target
    assert len(model.clean) == digits_family.CLEAN_IMAGES
    read = load_infected(model.name)  # out of the cache: the same to the last bit
    images = model.test.images[:40]
    assert torch.equal(model.network(images), read.network(images))
    assert [value.stride() for value in model.network.parameters()] == [
        value.stride() for value in read.network.parameters()
    ]
    assert not set(model.clean.source.indices) & set(model.test.source.indices)


def test_only_the_defenders_images_are_corrupted(infected):
    shifted = family.corrupted(infected, "brightness", 0.04)
    assert not torch.equal(shifted.clean.images, infected.clean.images)
    assert torch.equal(shifted.clean.labels, infected.clean.labels)
    assert shifted.test is infected.test
    assert shifted.network is infected.network
    assert shifted.facts["corruption"] == "brightness"


def test_half_of_the_family_is_corrupted_and_a_name_always_alike():
    kinds = Counter(family.corruption(f"digits-test/{seed}")["kind"] for seed in range(400))
    assert 160 < kinds["none"] < 240
    assert kinds["jpeg"] > 60
    assert kinds["brightness"] > 60
    assert family.corruption("digits-test/5") == family.corruption("digits-test/5")
