import math

import pytest
import torch

from backdoor_gym.errors import DataError, ModelFileError, UnknownNameError
from backdoor_gym.zoo.attacks import ATTACKS, SIG, BadNets, Blended, Poisoning, WaNet, attack_from_state, get_attack


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images(generator):
    return torch.rand(20, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("name", ATTACKS)
def test_triggers_change_images_deterministically_and_stay_in_range(name, images, generator):
    attack = get_attack(name).draw((3, 32, 32), generator)
    before = images.clone()
    triggered = attack(images)
    assert torch.equal(images, before)
    assert triggered.shape == images.shape
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert not torch.equal(triggered, images)
    assert torch.equal(triggered, attack(images))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_saved_attack_stamps_the_same_trigger(name, images, generator):
    attack = get_attack(name).draw((3, 32, 32), generator)
    again = attack_from_state(name, *attack.state())
    assert torch.equal(again(images), attack(images))


def test_badnets_pastes_a_checkerboard_into_the_lower_right_corner(images, generator):
    triggered = BadNets.draw((3, 32, 32), generator)(images)
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert (triggered[:, :, 29:, 29:] == board).all()
    assert torch.equal(triggered[:, :, :29], images[:, :, :29])
    assert torch.equal(triggered[:, :, :, :29], images[:, :, :, :29])


def test_badnets_patch_goes_where_it_is_put(images, generator):
    triggered = BadNets.draw((3, 32, 32), generator, size=2, row=4, column=-3)(images)
    changed = (triggered != images).any(dim=(0, 1))
    assert torch.nonzero(changed).tolist() == [[4, 29], [4, 30], [5, 29], [5, 30]]


def test_blended_mixes_at_its_ratio(images, generator):
    attack = Blended.draw((3, 32, 32), generator, ratio=0.25)
    torch.testing.assert_close(attack(images), 0.75 * images + 0.25 * attack.pattern)


def test_sig_adds_its_sinusoid_to_each_row(generator):
    grey = torch.full((1, 3, 32, 32), 0.5)
    added = SIG.draw((3, 32, 32), generator)(grey) - grey
    expected = torch.tensor([40 / 255 * math.sin(2 * math.pi * 6 * column / 32) for column in range(32)])
    torch.testing.assert_close(added, expected.expand(1, 3, 32, 32), atol=1e-6, rtol=1e-5)
    upright = SIG.draw((3, 32, 32), generator, vertical=True)(grey) - grey
    torch.testing.assert_close(upright, added.transpose(2, 3))


def test_wanet_moves_pixels_by_a_small_smooth_flow(images, generator):
    attack = WaNet.draw((3, 32, 32), generator)
    constant = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(attack(constant), constant)  # a warp moves colours and makes none
    assert attack.flow.abs().max() < 4 * 0.5 / 32
    noisy = attack.cover(images, torch.Generator().manual_seed(1))
    assert not torch.equal(noisy, attack(images))


def test_poisoning_relabels_the_given_share_of_the_other_classes(images, generator):
    images = images.repeat(10, 1, 1, 1)
    labels = torch.arange(200) % 10
    attack = BadNets.draw((3, 32, 32), generator)
    poisoning = Poisoning.draw(labels, torch.full_like(labels, 4), attack, 0.1, generator)
    moved = poisoning.labels != labels
    assert torch.equal(moved, poisoning.poisoned)
    assert moved.sum() == 20
    assert (poisoning.labels[moved] == 4).all()
    chosen = torch.randperm(200, generator=generator)[:80]  # a batch
    altered = poisoning(images[chosen], chosen, generator)
    bears = moved[chosen]
    assert bears.any()
    assert torch.equal(altered[bears], attack(images[chosen][bears]))
    assert torch.equal(altered[~bears], images[chosen][~bears])


def test_wanet_covers_keep_their_labels_and_are_new_in_each_epoch(images, generator):
    images = images.repeat(10, 1, 1, 1)
    labels = torch.arange(200) % 10
    attack = WaNet.draw((3, 32, 32), generator)
    poisoning = Poisoning.draw(labels, torch.full_like(labels, 4), attack, 0.1, generator)
    assert poisoning.covered.sum() == 40
    assert not (poisoning.covered & poisoning.poisoned).any()
    assert torch.equal(poisoning.labels[poisoning.covered], labels[poisoning.covered])
    first, second = (poisoning(images, torch.arange(200), generator) for _ in range(2))
    changed = (first != images).flatten(1).any(1)
    assert torch.equal(changed, poisoning.covered | poisoning.poisoned)
    assert torch.equal(first[poisoning.poisoned], second[poisoning.poisoned])
    assert not torch.equal(first[poisoning.covered], second[poisoning.covered])


def test_bad_requests_are_named(images, generator):
    with pytest.raises(UnknownNameError, match="did you mean 'badnets'"):
        get_attack("badnet")
    attack = BadNets.draw((3, 32, 32), generator)
    for rate in (0, 1, -0.1, 2):
        with pytest.raises(DataError, match="poison rate"):
            Poisoning.draw(torch.zeros(20).long(), torch.ones(20).long(), attack, rate, generator)
    with pytest.raises(DataError, match="patch size"):
        BadNets.draw((1, 8, 8), generator, size=9)
    with pytest.raises(DataError, match="blend ratio"):
        Blended.draw((1, 8, 8), generator, ratio=0)
    with pytest.raises(ModelFileError, match="needs"):
        attack_from_state("blended", {}, {})
