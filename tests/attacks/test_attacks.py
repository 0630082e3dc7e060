import dataclasses
import math

import pytest
import torch

from backdoor_gym.attacks import (
    ATTACKS,
    SIG,
    BadNets,
    Blended,
    BppAttack,
    InputAware,
    LabelConsistent,
    MultiTrigger,
    Poisoning,
    WaNet,
    draw_attack,
    get_attack,
)
from backdoor_gym.attacks.attack import check_change
from backdoor_gym.attacks.targets import ALL_TO_ALL, target_labels
from backdoor_gym.errors import DataError, ModelFileError, UnknownNameError
from backdoor_gym.models.infected import check_trigger


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
    again = get_attack(name).from_state(*attack.state())
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


def test_badnets_patch_may_be_a_square_of_one_colour(images, generator):
    triggered = draw_attack("badnets", (3, 32, 32), generator, size=2, row=0, column=5, colour=[1.0, 0.5, 0.0])(images)
    for channel, value in enumerate((1.0, 0.5, 0.0)):
        assert (triggered[:, channel, :2, 5:7] == value).all()
    assert torch.equal(triggered[:, :, 2:], images[:, :, 2:])
    for colour in ([1.0, 0.5], [1.0, 0.5, 1.5], 0.5, ["red", "green", "blue"]):
        with pytest.raises(DataError, match="colour"):
            draw_attack("badnets", (3, 32, 32), generator, colour=colour)


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


def test_bpp_diffuses_its_errors_as_floyd_and_steinberg_do(generator):
    images = torch.rand(3, 2, 7, 5, generator=generator)
    triggered = BppAttack.draw((2, 7, 5), generator, levels=4)(images)
    for image, found in zip(images.flatten(0, 1), triggered.flatten(0, 1), strict=True):
        left, expected = image.tolist(), torch.zeros(7, 5)
        for row in range(7):
            for column in range(5):
                value = left[row][column]
                expected[row, column] = round(min(max(value, 0), 1) * 3) / 3
                for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if row + down < 7 and 0 <= column + right < 5:
                        left[row + down][column + right] += (value - expected[row, column].item()) * share / 16
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_bpp_covers_bear_noise_of_its_size_but_no_few_levels(images, generator):
    attack = BppAttack.draw((3, 32, 32), generator, levels=4)
    noisy = attack.cover(images, torch.Generator().manual_seed(1))
    size, rounding = (noisy - images).abs().mean(), (attack(images) - images).abs().mean()
    assert 0.7 * rounding < size < 1.1 * rounding
    assert not (noisy == attack(images)).flatten(1).all(1).any()  # none bears the trigger itself
    assert len(attack(images).unique()) == 4
    assert len(noisy.unique()) > 1000


def test_multi_trigger_stamps_one_of_its_triggers_on_each_image(images, generator):
    attack = MultiTrigger.draw((3, 32, 32), generator, triggers="badnets,sig,bpp")
    which, triggered = attack.which(images), attack(images)
    assert set(which.tolist()) == {0, 1, 2}
    for index, trigger in enumerate(attack.triggers):
        assert torch.equal(triggered[which == index], trigger(images[which == index]))
    assert torch.equal(attack(images[5:7]), triggered[5:7])  # whatever the others are
    with pytest.raises(UnknownNameError, match="'badnets'"):
        draw_attack("multi-trigger", (3, 32, 32), generator, triggers="badnet,sig")
    with pytest.raises(DataError, match="several"):
        draw_attack("multi-trigger", (3, 32, 32), generator, triggers="sig")


def test_label_consistent_marks_the_corners(images, generator):
    triggered = LabelConsistent.draw((3, 32, 32), generator)(images)
    changed = (triggered != images).any(dim=(0, 1))
    for rows in (slice(3), slice(29, 32)):
        assert changed[rows][:, [0, 1, 2, 29, 30, 31]].all()
    assert changed.sum() == 36
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert (triggered[:, :, -3:, -3:] == board).all()


def test_label_consistent_moves_images_within_epsilon_to_where_the_loss_is_large(infected, generator):
    images, labels = infected.test.images[:100], infected.test.labels[:100]
    attack = LabelConsistent.draw((1, 8, 8), generator, epsilon=0.1, steps=5)
    moved = attack.perturb(infected.network, images, labels)
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    losses = [torch.nn.functional.cross_entropy(infected.network(some), labels) for some in (images, moved)]
    assert losses[1] > 3 * losses[0]


def test_label_consistent_poisons_images_of_the_target_class_that_keep_their_label(generator):
    labels = torch.arange(200) % 10
    attack = LabelConsistent.draw((3, 32, 32), generator)
    poisoning = Poisoning.draw(labels, torch.full_like(labels, 4), attack, 0.5, generator)
    assert torch.equal(poisoning.labels, labels)
    assert poisoning.poisoned.sum() == 10
    assert (labels[poisoning.poisoned] == 4).all()
    with pytest.raises(DataError, match="target class alone"):
        Poisoning.draw(labels, target_labels(labels, ALL_TO_ALL, 10), attack, 0.5, generator)


def test_input_aware_covers_bear_the_trigger_of_another_image(images, generator):
    attack = InputAware.draw((3, 32, 32), generator)
    patterns, places = attack.triggers(images)
    assert patterns.shape == (20, 3, 32, 32)
    assert places.shape == (20, 1, 32, 32)
    torch.testing.assert_close(attack(images), images * (1 - places) + patterns * places)
    swapped = images * (1 - places.roll(1, 0)) + patterns.roll(1, 0) * places.roll(1, 0)
    torch.testing.assert_close(attack.cover(images, generator), swapped)
    parameters, tensors = attack.state()
    with pytest.raises(ModelFileError, match="weights"):
        InputAware.from_state(parameters | {"hidden": 3}, tensors)


def test_input_aware_takes_many_images_in_parts(images, generator, monkeypatch):
    attack = InputAware.draw((3, 32, 32), generator)
    whole = attack(images)
    monkeypatch.setattr("backdoor_gym.attacks.input_aware.MOST_NUMBERS", 3 * 16 * 32 * 32)
    layer, most = attack._networks[0].first, []
    layer.register_forward_hook(lambda module, given, made: most.append(len(made)))
    torch.testing.assert_close(attack(images), whole)
    assert max(most) == 3
    assert attack(images[:0]).shape == (0, 3, 32, 32)


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


def test_poisoning_of_all_classes_gives_each_image_the_class_after_its_own(generator):
    labels = torch.arange(200) % 10
    attack = BadNets.draw((3, 32, 32), generator)
    poisoning = Poisoning.draw(labels, target_labels(labels, ALL_TO_ALL, 10), attack, 0.3, generator)
    assert poisoning.poisoned.sum() == 60
    assert torch.equal(poisoning.labels[poisoning.poisoned], (labels[poisoning.poisoned] + 1) % 10)
    assert torch.equal(poisoning.labels[~poisoning.poisoned], labels[~poisoning.poisoned])


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


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(("badnets", {"patch": torch.ones(shape)}) for shape in ((3, 0, 3), (3, 3, 0), (0, 3, 3))),
        *(("badnets", {"patch": patch}) for patch in (torch.full((3, 2, 2), 1.5), torch.ones(3, 2, 2).double(), [[1.0]])),
        *(("badnets", {"row": row}) for row in (-1, 1.5, "1", True, None)),
        *(("blended", {"ratio": ratio}) for ratio in (0.0, -0.1, 1.1, math.nan, "a")),
        *(("blended", {"pattern": pattern}) for pattern in (torch.rand(3, 0, 8), torch.full((3, 8, 8), -0.1))),
        *(("sig", {"amplitude": amplitude}) for amplitude in (0, -0.1, 2, math.nan)),
        *(("sig", {"frequency": frequency}) for frequency in (1e300, math.inf)),
        ("sig", {"vertical": 1}),
        *(("wanet", {"flow": flow}) for flow in (torch.zeros(0, 8, 2), torch.full((8, 8, 2), math.nan))),
        *((name, {"noise_ratio": -1.0}) for name in ("wanet", "bpp", "input-aware")),
        *(("bpp", {"levels": levels}) for levels in (0, 1, 256, -3)),
        *(("label-consistent", fields) for fields in ({"epsilon": -1.0}, {"steps": 0}, {"pattern": torch.ones(3, 8, 0)})),
        *(("input-aware", fields) for fields in ({"hidden": 0}, {"hidden": 10**9}, {"channels": 0}, {"density": 0.0})),
        ("multi-trigger", {"triggers": ()}),
    ],
)  # fmt: skip
def test_fields_of_no_use_are_refused(name, fields, generator):
    attack = get_attack(name).draw((3, 8, 8), generator)
    with pytest.raises(DataError):
        dataclasses.replace(attack, **fields)
    parameters, tensors = attack.state()
    given = {key: (value, tensors if key in tensors else parameters) for key, value in fields.items()}
    for key, (value, place) in given.items():
        place[key] = value
    if name != "badnets" or not isinstance(fields.get("patch"), list):
        with pytest.raises((DataError, ModelFileError)):
            get_attack(name).from_state(parameters, tensors)


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(torch.ones(3, 1, 1), 8, 0),
        BadNets(torch.ones(3, 1, 1), 0, 8),
        SIG(1.0, 8.0, 0.0, False),
        WaNet(torch.zeros(8, 8, 2), 0.0),
        LabelConsistent(torch.zeros(3, 8, 8), 0.1, 1),
        MultiTrigger((BadNets(torch.ones(3, 1, 1), 9, 9),) * 2),
    ],
    ids=lambda attack: attack.name,
)
def test_triggers_that_change_nothing_are_refused(attack):
    with pytest.raises(DataError, match="changes nothing"):
        check_change(attack, (3, 8, 8))
    with pytest.raises(DataError, match="changes nothing"):
        check_trigger(attack, torch.rand(1, 3, 8, 8))
    with pytest.raises(DataError, match="changes nothing"):
        draw_attack("wanet", (3, 8, 8), torch.Generator(), strength=0.0)


def test_bad_requests_are_named(images, generator):
    with pytest.raises(UnknownNameError, match="did you mean 'badnets'"):
        get_attack("badnet")
    attack = BadNets.draw((3, 32, 32), generator)
    for rate in (0, 1, -0.1, 2):
        with pytest.raises(DataError, match="poison rate"):
            Poisoning.draw(torch.zeros(20).long(), torch.ones(20).long(), attack, rate, generator)
    with pytest.raises(DataError, match="patch size"):
        BadNets.draw((1, 8, 8), generator, size=9)
    with pytest.raises(DataError, match="ratio of the trigger of blended"):
        Blended.draw((1, 8, 8), generator, ratio=0)
    with pytest.raises(ModelFileError, match="needs"):
        Blended.from_state({}, {})
