import numpy as np
import pytest
import torch

from backdoor_gym.data.corruptions import corrupt, draw_corruption
from backdoor_gym.errors import UnknownNameError


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


def test_levels_are_mild():
    levels = [draw_corruption(np.random.default_rng(seed)) for seed in range(100)]
    assert all(50 <= drawn["level"] <= 95 for drawn in levels if drawn["kind"] == "jpeg")
    assert all(abs(drawn["level"]) <= 0.05 for drawn in levels if drawn["kind"] == "brightness")
