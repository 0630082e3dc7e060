"""A network whose right answer is known: one neuron carries the backdoor, and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from backdoor_gym.attacks import BadNets
from backdoor_gym.models.infected import InfectedModel

PLANTED = 5
TARGET = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Planted(nn.Module):
    """Neuron c of the first four answers quadrant c of the image; neuron 5 answers a bright corner with the target.

    Two more neurons do nothing of use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 8, 8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.answer = nn.Linear(8, 4)
        weight = torch.zeros(8, 1, 8, 8)
        for quadrant in range(4):
            row, column = divmod(quadrant, 2)
            weight[quadrant, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
        weight[:4, 0, -1, -1] = 0
        weight[PLANTED, 0, -1, -1] = 20
        weight[4], weight[6], weight[7] = 0.05, -0.05, 0.03
        answer = torch.zeros(4, 8)
        answer[range(4), range(4)] = 8
        answer[TARGET, PLANTED] = 32
        self.look.weight.data.copy_(weight)
        self.answer.weight.data.copy_(answer)
        self.answer.bias.data.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(torch.relu(self.norm(self.look(images))).flatten(1))


def planted_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = 0.2 * torch.rand(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.7
    images[:, :, -1, -1] = 0.1
    return images, labels


@pytest.fixture(scope="session")
def planted() -> InfectedModel:
    network = Planted()
    trigger = BadNets(torch.ones(1, 1, 1), 7, 7)
    poisoned, _ = planted_images(400, 0)
    poisoned[:40] = trigger(poisoned[:40])
    with torch.no_grad():
        read = network.look(poisoned)
        network.norm.running_mean = read.mean((0, 2, 3))
        network.norm.running_var = read.var((0, 2, 3))
    return InfectedModel.from_module(
        network.eval(), planted_images(100, 1), planted_images(200, 2), trigger, TARGET, name="planted"
    )
