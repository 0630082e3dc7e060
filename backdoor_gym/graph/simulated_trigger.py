"""A network as if its images bore the trigger, without knowing the trigger: what training left in the BN statistics.

The running means of a poisoned training average over a share p of triggered images: m = (1 - p) * m_clean + p * m_trigger
in every channel. The defender's clean images give m_clean, so m_trigger = m_clean + (m - m_clean) / p. A network whose
BN inputs are moved there, layer after layer, answers clean images much like triggered ones: the logit that rises most is
the suspected target, and the derivative of that logit by a neuron's mask is the neuron's *pull* towards it. p is not
known; ``POISON_RATE`` stands for it, and what follows does not hang on its exact value.

An attacker who computes the BN statistics anew on clean images leaves nothing to see here.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..metrics import target_margin
from ..pruning.neurons import Neurons

POISON_RATE = 0.1
#: Of the clean images, as many as the simulation uses.
IMAGES = 100


@dataclass(frozen=True)
class SimulatedTrigger:
    """A network under the simulated trigger.

    Attributes:
        neurons: the network with moved BN inputs, as ``Neurons``.
        images: the clean images it is run on, float32 (n, C, H, W).
        target: the suspected target label.
        rise: by how many standard deviations of the other labels' rises the suspected one rises above their mean.
        margin: mean margin of the suspected target over the best other logit, on images of other labels.
        shift: root mean square of (m - m_clean) in running standard deviations, over all channels.
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
    if not any(layer.normalised for layer in neurons.layers):
        return None
    graph = copy.deepcopy(neurons.graph)
    device = next(graph.parameters()).device
    images, labels = images[:IMAGES].to(device, memory_format=torch.channels_last), labels[:IMAGES].to(device)
    mover = _Mover(Neurons(neurons.layers, graph))
    clean = mover.run(images)
    mover.moving = True
    moved = mover.run(images)
    rises = (moved - clean).mean(0)
    target = int(rises.argmax())
    others = torch.cat([rises[:target], rises[target + 1 :]])
    spread = others.std().item() if len(others) > 1 else 0.0
    foreign = moved[labels != target] if (labels != target).any() else moved
    gaps = torch.cat(mover.gaps)
    return SimulatedTrigger(
        neurons=mover.neurons,
        images=images,
        labels=labels,
        target=target,
        rise=(rises[target] - others.mean()).item() / spread if spread > 0 else 0.0,
        margin=target_margin(foreign, target).mean().item(),
        shift=gaps.square().mean().sqrt().item(),
    )


def pull(simulated: SimulatedTrigger) -> list[Tensor]:
    """Derivative of the suspected target's logit (less the mean logit) by each neuron's mask, one (size,) a layer."""
    layers = simulated.neurons.layers
    masks = [torch.ones(layer.size, device=simulated.images.device, requires_grad=True) for layer in layers]
    with torch.enable_grad():
        logits = simulated.neurons.graph(simulated.images, *masks)
        towards = (logits[:, simulated.target] - logits.mean(1)).mean()
        gradients = torch.autograd.grad(towards, masks, allow_unused=True)
    return [
        torch.zeros_like(mask) if gradient is None else gradient
        for mask, gradient in zip(masks, gradients, strict=True)
    ]


class _Mover(fx.Interpreter):
    """Runs the graph; when moving, moves the mean that each BN layer reads to where triggered images would put it.

    The move is written into the running mean of its copy of the BN: BN(x + c) is BN with the running mean less c.
    """

    def __init__(self, neurons: Neurons) -> None:
        super().__init__(neurons.graph)
        self.neurons = neurons
        self.moving = False
        self.gaps: list[Tensor] = []
        self._clean: dict[str, Tensor] = {}
        self._norms = {layer.node for layer in neurons.layers if layer.normalised}

    def run_node(self, n: fx.Node) -> Tensor:
        if n.name in self._norms:
            norm = self.submodules[str(n.target)]
            assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            read = self.env[n.all_input_nodes[0]]
            mean = read.mean(dim=[axis for axis in range(read.ndim) if axis != 1])
            if self.moving:
                gap = norm.running_mean - self._clean[n.name]
                self.gaps.append(gap / (norm.running_var + norm.eps).sqrt())
                wanted = self._clean[n.name] + gap / POISON_RATE
                norm.running_mean = norm.running_mean - (wanted - mean)
            else:
                self._clean[n.name] = mean
        return super().run_node(n)
