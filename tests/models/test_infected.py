import pytest
import torch
from torch import nn

from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.errors import DataError, ModelFileError, UnknownNameError, WeightsError
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.models.infected import InfectedModel


def own_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


CLEAN = torch.rand(10, 1, 8, 8), torch.arange(10) % 5


def test_a_file_holds_everything_but_the_images(infected, infected_file):
    again = InfectedModel.load(infected_file)
    for key, value in infected.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])
    assert torch.equal(again.clean.images, infected.clean.images)
    assert torch.equal(again.test.labels, infected.test.labels)
    assert torch.equal(again.trigger(again.clean.images), infected.trigger(infected.clean.images))
    assert (again.name, again.target, again.facts) == (infected.name, infected.target, infected.facts)
    assert again.evaluate() == infected.evaluate()
    tensors, _ = read_tensors(infected_file)
    assert not [key for key in tensors if key.endswith(".images")]


def test_half_files_have_half_the_size_and_the_same_figures(infected, infected_file, tmp_path):
    tensors, metadata = read_tensors(infected_file)
    rounded = {
        key: value.half().float() if key.startswith("network") and value.is_floating_point() else value
        for key, value in tensors.items()
    }
    write_tensors(tmp_path / "rounded.safetensors", rounded, metadata)
    model = InfectedModel.load(tmp_path / "rounded.safetensors")
    path = model.save(tmp_path / "half.safetensors", half=True)
    again = InfectedModel.load(path)
    assert path.stat().st_size < 0.6 * infected_file.stat().st_size
    assert again.network.linear.weight.dtype == torch.float32
    assert again.evaluate() == model.evaluate()


def test_images_of_no_data_set_are_held_in_the_file(infected, tmp_path):
    model = InfectedModel(
        infected.network,
        LabelledImages(infected.clean.images, infected.clean.labels),
        architecture=infected.architecture,
    )
    again = InfectedModel.load(model.save(tmp_path / "own.safetensors"))
    assert torch.equal(again.clean.images, infected.clean.images)
    assert again.test is None
    assert again.evaluate().acc is None


def test_a_module_of_your_own():
    model = InfectedModel.from_module(own_module(), clean=CLEAN)
    assert model.num_classes == 5
    with pytest.raises(ModelFileError, match="architecture"):
        model.save("nowhere.safetensors")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"clean": (torch.rand(4, 3, 8, 8), torch.zeros(4).long())}, DataError, "cannot take images"),
        ({"clean": (torch.rand(4, 1, 9, 9), torch.zeros(4).long())}, DataError, "cannot take images"),
        ({"clean": (torch.ones(4, 1, 8, 8).long(), torch.zeros(4).long())}, DataError, "divide by 255"),
        ({"clean": (torch.rand(4, 1, 8, 8), torch.full((4,), 5))}, DataError, "labels must be 0 to 4"),
        ({"clean": (torch.rand(0, 1, 8, 8), torch.zeros(0).long())}, DataError, "no image"),
        ({"clean": CLEAN, "target": 5}, DataError, "target 5"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        InfectedModel.from_module(own_module(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"test": (CLEAN[0], torch.full((10,), 99))}, "labels must be 0 to 4"),
        ({"test": (torch.rand(10, 1, 9, 9), CLEAN[1])}, "do not fit"),
        ({"target": 1.5}, "target 1.5"),
        ({"target": 1, "trigger": lambda images: images[:, :, :4]}, "must give images of shape"),
        ({"target": 1, "trigger": lambda images: images * float("nan")}, "values in"),
        ({"target": 1, "trigger": lambda images: images + torch.zeros(3, 5)}, "cannot be stamped"),
    ],
)
def test_what_only_scores_is_checked_too(arguments, words):
    with pytest.raises(DataError, match=words):
        InfectedModel.from_module(own_module(), clean=CLEAN, **arguments)


class Odd(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize("answer", [lambda x: (x, x), lambda x: x, lambda x: {}[0], lambda x: x.flatten()[:3]])
def test_networks_that_give_no_logits_are_refused(answer):
    with pytest.raises(DataError, match="the network"):
        InfectedModel.from_module(Odd(answer), clean=CLEAN)


def test_a_network_that_works_in_place_does_not_spoil_the_images():
    model = own_module()
    network = nn.Sequential(Odd(lambda x: x.sub_(0.5)), model)
    before = CLEAN[0].clone()
    infected = InfectedModel.from_module(network, clean=CLEAN, test=CLEAN)
    infected.evaluate()
    assert torch.equal(CLEAN[0], before)


def test_weights_that_are_not_finite_are_refused():
    module = own_module()
    module[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"not finite.*0\.weight"):
        InfectedModel.from_module(module, clean=CLEAN)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, m: m["architecture"].update(width=20), WeightsError, "of another shape"),
        (lambda t, m: m["architecture"].update(blocks=3), WeightsError, "missing"),
        (lambda t, m: m["architecture"].update(name="resnet8"), UnknownNameError, "did you mean 'resnet18'"),
        (lambda t, m: m["architecture"].update(name="resnet18", in_channels=1), UnknownNameError, "option"),
        (lambda t, m: m["architecture"].update(width=-1), DataError, "cannot be built"),
        (lambda t, m: m["architecture"].update(width="wide"), DataError, "must be a whole number"),
        (lambda t, m: m["architecture"].update(num_classes=10**13), ModelFileError, "architecture"),
        (lambda t, m: m["architecture"].update(width=300_000), WeightsError, "of another shape"),
        (lambda t, m: m.update(architecture="small_cnn"), ModelFileError, r"object.*architecture"),
        (lambda t, m: m.update(facts=[1]), ModelFileError, r"object.*facts"),
        (lambda t, m: m.update(name=3), ModelFileError, r"str.*name"),
        (lambda t, m: m.update(target=1.5), ModelFileError, r"float.*target"),
        (lambda t, m: m["trigger"]["parameters"].update(row=100), DataError, "trigger"),
        (lambda t, m: m["trigger"]["parameters"].update(row="a"), ModelFileError, "row of the trigger"),
        (lambda t, m: t["trigger.patch"].fill_(float("nan")), ModelFileError, "trigger"),
        (lambda t, m: t.update({"trigger.patch": torch.ones(5, 2)}), DataError, "trigger"),
        (lambda t, m: t.update({"clean.indices": t["clean.indices"].double()}), ModelFileError, "int64"),
        (lambda t, m: t.update({"clean.indices": t["test.indices"]}), DataError, "clean images"),
        (lambda t, m: m["architecture"].pop("num_classes"), WeightsError, "description"),
        (lambda t, m: t["network.linear.bias"].fill_(float("inf")), WeightsError, "finite"),
        (lambda t, m: t.update({"network.more": torch.zeros(1)}), WeightsError, "unexpected"),
        (lambda t, m: m.update(target=10), DataError, "target 10"),
        (lambda t, m: m.update(format="other"), ModelFileError, "not an infected model"),
        (lambda t, m: m.pop("data"), ModelFileError, "missing required field `data`"),
        (lambda t, m: m["trigger"].update(attack="badnet"), UnknownNameError, "badnets"),
        (lambda t, m: m["data"]["clean"].update(fingerprint="0" * 16), DataError, "not the one"),
        (lambda t, m: t["clean.indices"].add_(5000), DataError, "1797 images"),
        (lambda t, m: t.update({"clean.indices": torch.zeros(0, dtype=torch.long)}), DataError, "no images"),
    ],
)
def test_files_that_contradict_themselves_are_refused(infected_file, tmp_path, change, error, words):
    tensors, metadata = read_tensors(infected_file)
    change(tensors, metadata)
    write_tensors(tmp_path / "changed.safetensors", tensors, metadata)
    with pytest.raises(error, match=words):
        InfectedModel.load(tmp_path / "changed.safetensors")


class Answering(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.linear, self.answer = torch.nn.Linear(64, 3), answer

    def forward(self, images):
        return self.answer(self.linear(images.flatten(1)))


@pytest.mark.parametrize("answer", [torch.Tensor.long, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.to_sparse])
def test_logits_of_other_kinds_are_refused(answer):
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(DataError, match=r"logits as plain floating-point numbers, not torch|gives labels"):
        InfectedModel.from_module(Answering(answer).eval(), (images, torch.tensor([0, 1, 2, 0])))
