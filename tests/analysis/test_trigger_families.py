import pytest
import torch

from backdoor_gym.analysis.trigger_families import FAMILIES, Addition, Warp

IMAGES = torch.rand(3, 2, 8, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_begins_with_the_images_as_they_are(family):
    trigger = family(IMAGES)
    torch.testing.assert_close(trigger(IMAGES), IMAGES)
    assert trigger.price() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sought_has_a_gradient_and_a_price(family):
    trigger = family(IMAGES)
    trigger(IMAGES).square().sum().backward()
    assert trigger.parameter.grad.abs().sum() > 0
    trigger.parameter.data.fill_(0.5)
    assert trigger.price() > 0


def test_a_pattern_is_added_and_cut():
    trigger = Addition(IMAGES)
    trigger.parameter.data[0, 1, 2, 3] = 0.5
    changed = trigger(IMAGES)
    torch.testing.assert_close(changed[:, 1, 2, 3], (IMAGES[:, 1, 2, 3] + 0.5).clamp(max=1))
    assert (changed != IMAGES).sum() <= len(IMAGES)


def test_offsets_are_in_pixels():
    trigger = Warp(IMAGES)
    trigger.parameter.data[0, 0] = 1  # to the right, so each pixel shows its neighbour on the right
    torch.testing.assert_close(trigger(IMAGES)[..., :-1], IMAGES[..., 1:])
    trigger.parameter.data[0, 0], trigger.parameter.data[0, 1] = 0, 1
    torch.testing.assert_close(trigger(IMAGES)[..., :-1, :], IMAGES[..., 1:, :])


def test_a_single_row_can_be_warped():
    assert torch.isfinite(Warp(IMAGES[:, :, :1])(IMAGES[:, :, :1])).all()
