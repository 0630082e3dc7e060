import copy

import pytest
import torch

from backdoor_gym.data.datasets import load_images
from backdoor_gym.errors import ModelFileError, TrainingError, UnknownNameError
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.models import training
from backdoor_gym.models.infecting import infect
from backdoor_gym.models.training import Schedule, train
from backdoor_gym.networks import build

SCHEDULE = Schedule(epochs=3, batch_size=64, learning_rate=0.05)


@pytest.fixture
def data():
    images, labels = load_images("digits", "all")
    return images[:400], labels[:400]


def fresh():
    torch.manual_seed(0)
    return build("small_cnn", 10, 1, width=8, blocks=2)


def test_training_lowers_the_loss_and_ends_in_eval_mode(data):
    network = fresh()
    before = torch.nn.functional.cross_entropy(copy.deepcopy(network).eval()(data[0]), data[1])
    train(network, *data, Schedule(epochs=8, batch_size=64, learning_rate=0.05, augment=False), seed=1)
    assert not network.training
    assert torch.nn.functional.cross_entropy(network(data[0]), data[1]) < 0.7 * before


def test_a_killed_run_goes_on_and_gives_the_same_weights(data, tmp_path, monkeypatch):
    uninterrupted = fresh()
    train(uninterrupted, *data, SCHEDULE, seed=1)

    checkpoint, save = tmp_path / "run.checkpoint", training._save

    def save_and_die(path, run, epoch, *rest):
        save(path, run, epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), *data, SCHEDULE, seed=1, checkpoint=checkpoint)
    monkeypatch.setattr(training, "_save", save)

    steps = []
    resumed = fresh()
    resumed.register_forward_hook(lambda *_: steps.append(1))
    train(resumed, *data, SCHEDULE, seed=1, checkpoint=checkpoint)
    assert len(steps) == 7  # one epoch of 400 images
    for key, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key

    train(fresh(), *data, SCHEDULE, seed=1, checkpoint=checkpoint)  # a finished run is not run again
    assert len(steps) == 7


def test_a_checkpoint_of_another_run_is_refused_and_kept(data, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    train(fresh(), *data, SCHEDULE, seed=1, checkpoint=checkpoint)
    others = (
        (fresh(), *data, SCHEDULE, 2),
        (fresh(), *data, Schedule(epochs=4, batch_size=64, learning_rate=0.05), 1),
        (fresh(), data[0], data[1].flip(0), SCHEDULE, 1),
        (fresh(), 1 - data[0], data[1], SCHEDULE, 1),
        (build("small_cnn", 10, 1, width=9, blocks=2), *data, SCHEDULE, 1),
    )
    for other in others:
        with pytest.raises(ModelFileError, match="another training run"):
            train(*other, checkpoint=checkpoint)
    assert checkpoint.exists()


def test_an_infection_is_not_resumed_with_another_trigger(tmp_path):
    def run(**options):
        return infect(
            "digits",
            "small_cnn",
            "sig",
            schedule=Schedule(epochs=1, batch_size=64),
            architecture_options={"width": 4, "blocks": 2},
            attack_options=options,
            checkpoint=tmp_path / "run.checkpoint",
        )

    run(frequency=1)
    with pytest.raises(ModelFileError, match="another training run"):
        run(frequency=3)


def test_a_loss_that_explodes_is_an_error(data):
    with pytest.raises(TrainingError, match="lower learning rate"):
        train(fresh(), data[0] * float("inf"), data[1], SCHEDULE, seed=1)


def test_augmentation_shifts_and_flips_within_the_padding():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3, 2] = 1
    places = set()
    for seed in range(200):
        moved = training.augment(image, torch.Generator().manual_seed(seed))
        assert moved.shape == image.shape
        places |= {tuple(place) for place in torch.nonzero(moved[0, 0]).tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)}


def test_images_are_not_mirrored_where_that_would_make_them_others():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3, 2] = 1
    columns = {
        int(torch.nonzero(training.augment(image, torch.Generator().manual_seed(seed), flip=False))[0, 3])
        for seed in range(100)
    }
    assert columns == {1, 2, 3}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, fields: fields.update(epoch="x"),
        lambda tensors, fields: fields.update(epoch=99),
        lambda tensors, fields: fields.update(epoch=-5),
        lambda tensors, fields: fields.update(epoch=True),
        lambda tensors, fields: fields.pop("epoch"),
        lambda tensors, fields: tensors.pop("momentum_buffer.0"),
        lambda tensors, fields: tensors.update({"momentum_buffer.0": torch.zeros(3)}),
        lambda tensors, fields: tensors.update({"momentum_buffer.0": tensors["momentum_buffer.0"] * torch.nan}),
        lambda tensors, fields: tensors.update({"more": torch.zeros(1)}),
        lambda tensors, fields: [tensors.pop(key) for key in list(tensors) if key.startswith("network.")],
        lambda tensors, fields: tensors.update(
            {key: value.double() for key, value in tensors.items() if key.startswith("network.")}
        ),
    ],
)
def test_a_checkpoint_that_is_not_of_its_run_is_refused(data, tmp_path, change):
    checkpoint = tmp_path / "run.checkpoint"
    train(fresh(), *data, SCHEDULE, seed=1, checkpoint=checkpoint)
    tensors, fields = read_tensors(checkpoint)
    change(tensors, fields)
    write_tensors(checkpoint, tensors, fields)
    network = fresh()
    before = [value.clone() for value in network.state_dict().values()]
    with pytest.raises(ModelFileError, match="remove it"):
        train(network, *data, SCHEDULE, seed=1, checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))


def test_a_training_with_adam_goes_on_where_it_was(data, tmp_path, monkeypatch):
    schedule = Schedule(epochs=2, batch_size=64, learning_rate=0.002, optimizer="adam")
    whole, resumed = fresh(), fresh()
    train(whole, *data, schedule, seed=1)
    checkpoint = tmp_path / "run.checkpoint"
    saved = []
    save = training._save

    def stop(*arguments):
        save(*arguments)
        saved.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, *data, schedule, seed=1, checkpoint=checkpoint)
    monkeypatch.setattr(training, "_save", save)
    resumed = fresh()
    train(resumed, *data, schedule, seed=1, checkpoint=checkpoint)
    assert len(saved) == 1
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_an_optimizer_must_be_a_known_one():
    with pytest.raises(UnknownNameError, match="optimizer"):
        Schedule(optimizer="adamm")
