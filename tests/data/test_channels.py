import pytest
import torch
from PIL import Image
from torch import nn

from backdoor_gym.data import datasets
from backdoor_gym.errors import DataError
from backdoor_gym.models.infected import InfectedModel

from .test_own_images import write_classes


def grey_network(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("role", ["clean", "test"])
def test_the_classes_of_a_folder_are_those_of_the_network(role, tmp_path):
    given = {"clean": (torch.rand(6, 1, 8, 8), torch.arange(6) % 3), role: write_classes(tmp_path, ["ant", "bee"], 2)}
    with pytest.raises(DataError, match=f"the {role} images have 2 classes and the network 3.*empty folder"):
        InfectedModel.from_module(grey_network(), **given)
    (tmp_path / "cat").mkdir()
    InfectedModel.from_module(grey_network(), **given)


@pytest.mark.parametrize("role", ["clean", "test"])
def test_grey_pictures_saved_as_colour_are_taken_as_grey(role, tmp_path):
    grey = (torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    given = {"clean": grey, role: write_classes(tmp_path, ["0", "1", "2"], 2, (7, 7, 7))}
    model = InfectedModel.from_module(grey_network(), **given)
    assert getattr(model, role).images.shape == (6, 1, 8, 8)
    assert torch.equal(getattr(model, role).images, torch.full((6, 1, 8, 8), 7 / 255))
    if role == "clean":
        assert "3 equal channels were taken as 1" in model.facts["channels"]
    Image.new("RGB", (8, 8), (7, 7, 8)).save(tmp_path / "0" / "coloured.png")
    with pytest.raises(DataError, match=r"takes grey ones .one channel., and 1 of 7 are coloured"):
        InfectedModel.from_module(grey_network(), **given)


def test_grey_pictures_for_a_network_of_colours_get_three_equal_channels(tmp_path):
    model = InfectedModel.from_module(grey_network(3), clean=write_classes(tmp_path, ["0", "1", "2"], 2))
    assert model.clean.images.shape == (6, 3, 8, 8)
    assert torch.equal(model.clean.images[:, 2], model.clean.images[:, 0])


def test_a_named_data_set_is_told_how_it_is_read():
    source = datasets.DataSource("some/set?size=8", "test", tuple(range(4)))
    named = datasets.LabelledImages.from_source(source)
    named._data = (torch.rand(4, 3, 8, 8), torch.arange(4) % 3)
    with pytest.raises(DataError, match=r"some/set\?size=8&channels=1"):
        InfectedModel(grey_network(), named)
