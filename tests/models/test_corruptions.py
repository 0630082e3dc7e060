from collections import Counter

import numpy as np
import pytest
import torch

from backdoor_gym.errors import UnknownNameError
from backdoor_gym.models import family
from backdoor_gym.models.corruptions import corrupt, corrupted, draw_corruption


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_changes_images_a_little_and_less_at_higher_quality(channels):
    images = torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    rough, fine = (corrupt(images, "jpeg", quality) for quality in (50, 95))
    assert rough.shape == images.shape
    assert rough.dtype == torch.float32
    assert 0 <= rough.min() <= rough.max() <= 1
    assert 0 < (fine - images).abs().mean() < (rough - images).abs().mean() < 0.3


def test_brightness_is_added_and_stays_in_range():
    images = torch.tensor([0.0, 0.5, 0.98]).view(1, 1, 1, 3)
    torch.testing.assert_close(corrupt(images, "brightness", 0.05).flatten(), torch.tensor([0.05, 0.55, 1.0]))
    assert corrupt(images, "none", 0.0) is images


def test_unknown_corruptions_are_named():
    with pytest.raises(UnknownNameError, match="jpeg"):
        corrupt(torch.rand(1, 1, 8, 8), "blurr", 1)


def test_only_the_defenders_images_are_corrupted(infected):
    shifted = corrupted(infected, "brightness", 0.04)
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
    levels = [draw_corruption(np.random.default_rng(seed)) for seed in range(100)]
    assert all(50 <= one["level"] <= 95 for one in levels if one["kind"] == "jpeg")
    assert all(abs(one["level"]) <= 0.05 for one in levels if one["kind"] == "brightness")
