import pytest
import torch

from backdoor_gym.errors import UnknownNameError
from backdoor_gym.zoo.architectures import ARCHITECTURES, build


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_width_scales_and_logits_come_out(name):
    channels, size = (1, 8) if name == "small_cnn" else (3, 32)
    sizes = []
    for width in (8, 16):
        network = build(name, num_classes=7, in_channels=channels, width=width).eval()
        assert network(torch.rand(2, channels, size, size)).shape == (2, 7)
        sizes.append(sum(parameter.numel() for parameter in network.parameters()))
    assert sizes[1] > 2.5 * sizes[0]


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet18", 11.17), ("preact_resnet18", 11.17), ("vgg16", 14.73), ("wrn16", 0.175)]
)
def test_published_widths_have_the_published_number_of_parameters(name, millions):
    count = sum(parameter.numel() for parameter in build(name, 10, 3).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        build("resnet8", 10, 3)
    with pytest.raises(UnknownNameError, match="did you mean 'width'"):
        build("resnet18", 10, 3, widht=16)
    with pytest.raises(UnknownNameError, match="preact"):
        build("small_cnn", 10, 1, shape="preactt")
