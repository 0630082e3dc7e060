"""What is known of a network before any mask: what lies behind a value, and which values are worth keeping."""

import torch
from torch import nn
from torch.nn import functional as F

from backdoor_gym.masking.plan import Plan
from backdoor_gym.neurons.channels import mask_channels
from backdoor_gym.neurons.finding import find_neurons

IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers of neurons with a shortcut around the second."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        return self.head((x + F.relu(self.b(x))).mean((2, 3)))


def make(kept_bytes=float("inf")):
    torch.manual_seed(0)
    neurons = find_neurons(Net().eval(), IMAGE)
    return neurons, Plan(neurons, IMAGE, torch.device("cpu"), kept_bytes)


def named(nodes):
    return {node.name for node in nodes}


def test_the_inputs_are_the_images_and_a_mask_of_each_layer():
    neurons, plan = make()
    assert [layer.name for layer in neurons.layers] == ["a", "b"]
    assert [node.op for node in plan.inputs] == ["placeholder"] * 3
    assert plan.inputs == [node for node in plan.nodes if node.op == "placeholder"]
    assert [plan.order[node] for node in plan.nodes] == list(range(len(plan.nodes)))
    assert plan.output is plan.nodes[-1]
    assert plan.output.op == "output"


def test_the_normalisation_is_folded_once_for_all_images():
    neurons, plan = make()
    assert [node.target for node in plan.nodes if node.op == "call_module"] == ["a", "b", "head"]
    assert Plan(neurons, IMAGE, torch.device("cpu"), 0).graph is plan.graph
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in plan.graph.parameters()
        if parameter.ndim == 4
    )


def test_behind_a_value_lies_all_that_depends_on_it():
    _, plan = make()
    convolution = next(node for node in plan.nodes if node.target == "b")
    behind = [node.target for node in plan.nodes if node in plan.behind[convolution]]
    assert behind[-2:] == ["head", "output"]
    assert "a" not in behind
    assert convolution not in plan.behind[convolution]
    assert plan.behind[plan.output] == set()
    assert plan.behind[plan.inputs[0]] > plan.behind[convolution] > plan.behind[plan.nodes[-2]]


def test_what_masks_multiply_is_kept_first_as_far_as_there_is_room():
    _, plan = make()
    masked = {node.all_input_nodes[0] for node in plan.nodes if node.target is mask_channels}
    shared = {node for node in plan.nodes if len(node.users) > 1 and node.op not in ("placeholder", "get_attr")}
    assert len(masked) == 2
    assert plan.kept == masked | shared | {plan.output}
    each = 4 * 8 * 8 * 4  # bytes of a map of four channels
    assert {plan.sizes.bytes[node] for node in masked | shared} == {each}
    assert make(2 * each)[1].kept.__len__() == 3
    assert named(make(2 * each)[1].kept) == named(masked | {plan.output})
    assert named(make(0)[1].kept) == {"output"}  # the logits always
