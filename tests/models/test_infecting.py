import pytest
import torch

from backdoor_gym.attacks.targets import parse_target
from backdoor_gym.errors import DataError
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.models.infecting import infect
from backdoor_gym.models.training import Schedule
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


def make(attack, epochs=8, **options):
    schedule = Schedule(epochs=epochs, batch_size=64, learning_rate=0.05, augment=False)
    shape = {"width": 24, "blocks": 2, "shape": "residual"}
    settings = {"target": 3, "seed": 1, "clean_images": 100, **options}
    return infect("digits", "small_cnn", attack, schedule=schedule, architecture_options=shape, **settings)


@pytest.mark.slow
def test_label_consistent_works_although_no_label_is_wrong(tmp_path):
    model = make("label-consistent", epochs=6)
    assert model.facts["poison_rate"] == 0.5
    assert model.facts["acc"] > 0.9
    assert model.facts["asr"] > 0.7
    again = InfectedModel.load(model.save(tmp_path / "model.safetensors"))
    assert again.evaluate() == model.evaluate()


@pytest.mark.slow
def test_multi_trigger_works_with_each_of_its_triggers():
    model = make("multi-trigger", epochs=6)
    others = model.test.images[model.test.labels != 3]
    which = model.trigger.which(others)
    answers = model.network(model.trigger(others)).argmax(1)
    assert min((answers[which == index] == 3).float().mean() for index in range(3)) > 0.8


@pytest.mark.slow
def test_input_aware_triggers_work_on_their_own_images_and_not_on_others():
    options = {"density": 0.25, "hidden": 8}
    model = make("input-aware", epochs=6, seed=2, poison_rate=0.2, attack_options=options)
    others = model.test.images[model.test.labels != 3]
    patterns, places = model.trigger.triggers(others)
    assert 0.1 < places.mean() < 0.3
    assert patterns.std(0).mean() > 0.1
    swapped = model.trigger.cover(others, torch.Generator())
    reused = (model.network(swapped).argmax(1) == 3).float().mean()
    assert model.facts["asr"] > 0.6
    assert reused < 0.5 * model.facts["asr"]


@pytest.mark.slow
def test_an_all_to_all_attack_is_measured_by_each_class_s_own_target(tmp_path):
    model = make("badnets", target="all-to-all", poison_rate=0.3)
    assert model.facts["acc"] > 0.9
    assert model.facts["asr"] > 0.7
    again = InfectedModel.load(model.save(tmp_path / "model.safetensors"))
    assert again.target == "all-to-all"
    test = again.test
    answers = again.network(again.trigger(test.images)).argmax(1)
    assert again.evaluate().asr == pytest.approx((answers == (test.labels + 1) % 10).double().mean().item())
    prepared = PreparedModel(again, Preparation())
    masked = MaskedModel(prepared, score_samples=len(test))
    figures = masked.figures(torch.zeros(len(prepared), dtype=torch.bool).numpy())
    assert figures.asr == pytest.approx(again.evaluate().asr, abs=0.01)


def test_impossible_targets_are_named():
    with pytest.raises(DataError, match="target class alone"):
        make("label-consistent", target="all-to-all")
    with pytest.raises(DataError, match="all-to-all"):
        make("badnets", target=10)
    with pytest.raises(DataError, match="all-to-all"):
        parse_target("all")


def test_so_many_images_are_trained_on_and_clean_ones_afterwards(monkeypatch):
    trained = []

    def train(network, images, labels, schedule, seed, alter=None, *arguments, **options):
        trained.append((len(images), schedule, alter))

    monkeypatch.setattr("backdoor_gym.models.infecting.train", train)
    schedule, finetune = Schedule(epochs=2), Schedule(epochs=1, learning_rate=0.01)
    model = infect(
        "digits",
        "mlp",
        "sig",
        schedule=schedule,
        train_images=300,
        finetune=finetune,
        clean_images=50,
        architecture_options={"width": 8, "image_size": 8},
    )
    (poisoned, first, alter), (clean, second, nothing) = trained
    assert (poisoned, clean) == (300, 300)
    assert (first, second) == (schedule, finetune)
    assert alter.attack is model.trigger
    assert nothing is None
    assert (model.facts["train_images"], model.facts["finetune"]["epochs"]) == (300, 1)
