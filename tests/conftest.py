"""Models that many tests share, small enough to be made in a second or two."""

import os
import sys

# Before torch is imported: two busy test processes on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from backdoor_gym import cli
from backdoor_gym.analysis.evidence import Evidence, find_evidence
from backdoor_gym.cli import common
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.models.infecting import infect
from backdoor_gym.models.training import Schedule
from backdoor_gym.networks import build
from backdoor_gym.session import prepared_model

#: What most of the small networks are.
RESIDUAL = {"width": 16, "blocks": 2, "shape": "residual"}
QUICK = Schedule(epochs=4, batch_size=64, learning_rate=0.05, augment=False)


def settle(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give the batch normalisations statistics and weights as if the network had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -1, 1),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network.eval()


@pytest.fixture
def network_of() -> Callable[..., nn.Module]:
    """Makes a small network of a known architecture that looks trained."""

    def make(name: str, **options) -> nn.Module:
        torch.manual_seed(0)
        channels = 1 if name == "small_cnn" else 3
        return settle(build(name, num_classes=10, in_channels=channels, **{"width": 8, **options}))

    return make


@pytest.fixture(scope="session")
def infected() -> InfectedModel:
    """A small residual digits network with a patch backdoor."""
    return infect(
        "digits",
        "small_cnn",
        "badnets",
        target=3,
        schedule=QUICK,
        architecture_options=RESIDUAL,
        clean_images=100,
        name="tiny",
    )


@pytest.fixture(scope="session")
def plain_infected() -> InfectedModel:
    """A smaller plain one, with another trigger."""
    return infect(
        "digits",
        "small_cnn",
        "blended",
        target=1,
        seed=1,
        schedule=QUICK,
        architecture_options={"width": 12, "blocks": 3},
        clean_images=100,
        name="tiny-plain",
    )


@pytest.fixture(scope="session")
def infected_file(infected: InfectedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infected.save(tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture(scope="session")
def plain_infected_file(plain_infected: InfectedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_infected.save(tmp_path_factory.mktemp("models") / "tiny-plain.safetensors")


@pytest.fixture(scope="session", autouse=True)
def sought_once():
    """The trigger of the same network in the same images is sought once: most of what making a model ready takes."""
    remembered: dict[tuple[str, str, int], Evidence] = {}

    def find(neurons, images, labels):
        digest = sha256()
        for tensor in (*neurons.graph.state_dict().values(), images, labels):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        key = neurons.graph.code, digest.hexdigest(), torch.get_num_threads()  # which sums hang on, in the last bit
        if key not in remembered:
            remembered[key] = find_evidence(neurons, images, labels)
        return remembered[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_model, "find_evidence", find)
        yield


@pytest.fixture
def two_threads():
    """Torch computes with two threads, as on most machines; elsewhere in the tests it has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.console, "width", 120, raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["backdoor-gym", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
