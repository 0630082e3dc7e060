"""A network as if its images bore the trigger, without knowing the trigger: what training left in the BN statistics.

The running means of a poisoned training average over a share p of triggered images: m = (1 - p) * m_clean + p * m_trigger
in every channel. The defender's clean images give m_clean, so m_trigger = m_clean + (m - m_clean) / p. A network whose
BN inputs are moved there, layer after layer, answers clean images much like triggered ones: the suspected target is the
label they then get, and the derivative of its logit by a neuron's mask is the neuron's *pull* towards it. p is not
known; ``POISON_RATE`` stands for it, and what follows does not hang on its exact value.

Two things other than a trigger move means too. Classes that are rarer among the defender's images than in training:
every class weighs the same in m_clean, as if training had been balanced. And images that differ from those of training
throughout, by compression say. So the target is read twice, as that whose mean probability rises most: from the network
moved as above, and from one whose early BN layers are moved by m - m_clean alone, as such a difference would move them,
while only what the late half then still lacks is divided by p. The reading in which one label stands out most is taken:
the first sees faint triggers that the second takes for such a difference, the second holds where there is one.

An attacker who computes the BN statistics anew on clean images leaves nothing to see here.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, fx, nn

from ..metrics import target_margin
from ..pruning.neurons import NeuronLayer, Neurons
from .mask_gradient import mask_gradient

POISON_RATE = 0.1
#: Of the clean images, as many as the simulation uses.
IMAGES = 100


@dataclass(frozen=True)
class SimulatedTrigger:
    """A network under the simulated trigger.

    Attributes:
        neurons: the network with moved BN inputs, as ``Neurons``.
        images: the clean images it is run on, float32 (n, C, H, W).
        labels: their labels, int64 (n,).
        target: the suspected target label.
        rise: how far the mean probability of that label rises in the clearer of the two readings, in [-1, 1].
        margin: mean margin of the suspected target over the best other logit, on images of other labels.
        shift: root mean square of (m - m_clean) in running standard deviations, over the channels of the late half.
    """

    neurons: Neurons
    images: Tensor
    labels: Tensor
    target: int
    rise: float
    margin: float
    shift: float


@torch.no_grad()
def simulate_trigger(neurons: Neurons, images: Tensor, labels: Tensor) -> SimulatedTrigger | None:
    """The simulated trigger of a network, or None where it has no batch normalisation that could tell.

    Args:
        neurons: of the network.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
    """
    norms = [layer for layer in neurons.layers if layer.normalised]
    if not norms:
        return None
    running, deviation = _running(neurons.graph, norms)
    device = next(neurons.graph.parameters()).device
    images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
    weights, few, few_weights = class_weights(labels), images[:IMAGES], class_weights(labels[:IMAGES])
    early, late = ([layer.node for layer in part] for part in (norms[: len(norms) // 2], norms[len(norms) // 2 :]))

    plain = _Mover(neurons, weights).run_on(images)
    gaps = {name: mean - plain.mean(name, weights) for name, mean in running.items()}
    everywhere = {name: plain.mean(name, few_weights) + gap / POISON_RATE for name, gap in gaps.items()}
    moved = _Mover(neurons, few_weights, everywhere).run_on(few)

    aligned = _Mover(neurons, weights, {name: running[name] for name in early}).run_on(images)
    lacking = {name: (running[name] - aligned.mean(name, weights)) / POISON_RATE for name in late}
    steps = aligned.moves | lacking
    beyond = {name: aligned.mean(name, few_weights) + step for name, step in steps.items()}
    amplified = _Mover(neurons, few_weights, beyond).run_on(few)
    readings = [
        few_weights @ (after.logits.softmax(1) - before.logits[:IMAGES].softmax(1))
        for before, after in ((plain, moved), (aligned, amplified))
    ]
    rises = max(readings, key=_clearness)
    target = int(rises.argmax())

    labels = labels[:IMAGES]
    foreign = moved.logits[labels != target] if (labels != target).any() else moved.logits
    shifts = torch.cat([gaps[name] / deviation[name] for name in late])
    return SimulatedTrigger(
        neurons=_moved(neurons, norms, moved.moves),
        images=few,
        labels=labels,
        target=target,
        rise=rises[target].item(),
        margin=target_margin(foreign, target).mean().item(),
        shift=shifts.square().mean().sqrt().item(),
    )


def _clearness(rises: Tensor) -> float:
    """How far the largest rise stands out: over the largest other change."""
    target = int(rises.argmax())
    others = torch.cat([rises[:target], rises[target + 1 :]]).abs()
    return (rises[target] / others.max().clamp(min=1e-12)).item()


def class_weights(labels: Tensor) -> Tensor:
    """Weights of images with which every class that is there weighs the same, float32 (n,), of sum 1."""
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    return 1 / (counts[classes] * len(counts))


def pull(simulated: SimulatedTrigger) -> Tensor:
    """Derivative of the suspected target's logit, less the mean logit, by each neuron's mask, float32 (neurons,)."""
    return mask_gradient(
        simulated.neurons,
        simulated.images,
        lambda logits: (logits[:, simulated.target] - logits.mean(1)).mean(),
    )


def _running(graph: nn.Module, norms: Sequence[NeuronLayer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Running mean and standard deviation of the BN of each layer, by the name of its node."""
    means, deviations = {}, {}
    for layer in norms:
        norm = graph.get_submodule(layer.module)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        means[layer.node], deviations[layer.node] = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    return means, deviations


def _moved(neurons: Neurons, norms: Sequence[NeuronLayer], moves: Mapping[str, Tensor]) -> Neurons:
    """A copy whose BN inputs are moved, by their running means: BN(x + c) is BN with the running mean less c."""
    graph = copy.deepcopy(neurons.graph)
    for layer in norms:
        norm = graph.get_submodule(layer.module)
        assert isinstance(norm.running_mean, Tensor)
        norm.running_mean = norm.running_mean - moves[layer.node]
    return Neurons(neurons.layers, graph)


class _Mover(fx.Interpreter):
    """Runs the graph and reads the mean input of each BN layer over the images, or moves it to where it is wanted.

    Attributes:
        moves: by how much each layer's input was moved, float32 (channels,).
        logits: float32 (n, classes).
    """

    def __init__(self, neurons: Neurons, weights: Tensor, wanted: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(neurons.graph)
        self.weights, self.wanted = weights, wanted or {}
        self.moves: dict[str, Tensor] = {}
        self.logits = torch.empty(0)
        self._read: dict[str, Tensor] = {}
        self._norms = {layer.node for layer in neurons.layers if layer.normalised}

    def run_on(self, images: Tensor) -> Self:
        self.logits = self.run(images)
        return self

    def mean(self, name: str, weights: Tensor) -> Tensor:
        """Mean that a layer's input had before it was moved, over the first images, by their weights."""
        return weights @ self._read[name][: len(weights)]

    def run_node(self, n: fx.Node) -> Tensor:
        if n.name not in self._norms:
            return super().run_node(n)
        inputs = self.env[n.all_input_nodes[0]]
        self._read[n.name] = inputs.flatten(2).mean(2) if inputs.ndim > 2 else inputs
        if n.name in self.wanted:
            move = self.wanted[n.name] - self.mean(n.name, self.weights)
            self.moves[n.name] = move
            inputs = inputs + move.view(-1, *[1] * (inputs.ndim - 2))
        return self.submodules[str(n.target)](inputs)
