import pytest
import torch
from torch import nn

from backdoor_gym.metrics import danger, der, evaluate, predict_logits, target_margin


class Rule(nn.Module):
    """Answers class 2 where the first pixel is white, else the class that the second pixel says."""

    def forward(self, x):
        answer = (x[:, 0, 0, 1] * 10).round().long()
        answer = torch.where(x[:, 0, 0, 0] == 1, torch.full_like(answer, 2), answer)
        return nn.functional.one_hot(answer, 4).float()


def images_of(classes):
    images = torch.zeros(len(classes), 1, 2, 2)
    images[:, 0, 0, 1] = torch.tensor(classes) / 10
    return images


def stamp(images):
    images = images.clone()
    images[::2, 0, 0, 0] = 1  # every other image: a trigger that works half of the time
    return images


def test_asr_and_ra_leave_out_the_target_class():
    labels = torch.tensor([0, 1, 2, 2, 3, 1])
    measured = evaluate(Rule(), images_of([0, 1, 2, 2, 3, 0]), labels, stamp, target=2)
    assert measured.acc == pytest.approx(5 / 6)
    # Of the others (0, 1, 3, 1) the first and the third bear the trigger; the last is wrong anyway.
    assert measured.asr == pytest.approx(2 / 4)
    assert measured.ra == pytest.approx(1 / 4)


def test_asr_and_ra_of_an_all_to_all_attack_take_each_image_by_its_own_target():
    labels = torch.tensor([0, 1, 2, 3])
    # The trigger, on the first and the third, gives class 2: of classes 0 and 2 neither the next one nor, of 0, its own.
    measured = evaluate(Rule(), images_of([1, 1, 2, 0]), labels, stamp, target="all-to-all")
    assert measured.acc == pytest.approx(2 / 4)
    assert measured.asr == pytest.approx(1 / 4)  # the last: 3 is taken for 0
    assert measured.ra == pytest.approx(2 / 4)


def test_margins_and_danger_take_one_target_or_one_each():
    logits = torch.tensor([[1.0, 4, 2], [5, 0, 3]])
    assert torch.equal(target_margin(logits, 0), torch.tensor([-3.0, 2.0]))
    assert torch.equal(target_margin(logits, torch.tensor([1, 2])), torch.tensor([2.0, -2.0]))
    assert danger(logits, torch.tensor([1, 2])) == pytest.approx(0.5)  # half succeed, and the margins are symmetric


def test_unknown_triggers_give_no_figure():
    measured = evaluate(Rule(), images_of([0, 1]), torch.tensor([0, 1]))
    assert (measured.acc, measured.asr, measured.ra) == (1.0, None, None)
    assert evaluate(Rule(), images_of([2]), torch.tensor([2]), stamp, 2).asr is None


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.9, 1.0, 0.9, 0.0), 1.0),
        ((0.9, 1.0, 0.8, 0.0), 0.95),
        ((0.9, 1.0, 0.9, 1.0), 0.5),
        ((0.9, 0.5, 0.95, 0.6), 0.5),  # better accuracy and a stronger attack earn nothing
        ((0.9, 1.0, 0.1, 1.0), 0.1),
    ],
)
def test_der(figures, expected):
    assert der(*figures) == pytest.approx(expected)


def test_logits_do_not_depend_on_the_batch_size(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).train()
    images = torch.rand(7, 1, 4, 4)
    expected = predict_logits(network, images)
    monkeypatch.setattr("backdoor_gym.metrics.BATCH_SIZE", 2)
    torch.testing.assert_close(predict_logits(network, images), expected)
    assert not network.training


@pytest.mark.parametrize("count", [1, 2, 500, 501])
def test_a_network_that_cannot_take_a_single_image_is_given_more(count):
    def answer(images):
        assert len(images) > 1
        return images.flatten(1)

    network = nn.Identity()
    network.forward = answer
    images = torch.rand(count, 1, 1, 2)
    assert torch.equal(predict_logits(network, images), images.flatten(1))
