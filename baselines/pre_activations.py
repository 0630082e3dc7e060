"""What the batch normalisations read on the clean images: moments and largest values of the pre-activations."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from backdoor_gym.metrics import batch_size
from backdoor_gym.session.defender import Defender

#: Images in one pass.
BATCH = 250


class _Reader(fx.Interpreter):
    """Keeps what each normalised layer of neurons reads, (n, channels, positions)."""

    def __init__(self, defender: Defender) -> None:
        super().__init__(defender.neurons.graph)
        self.nodes = {layer.node for layer in defender.neurons.layers if layer.normalised}
        self.read: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Tensor:
        if n.name in self.nodes:
            inputs = self.env[n.all_input_nodes[0]]
            self.read[n.name] = inputs.flatten(2) if inputs.ndim > 2 else inputs.unsqueeze(2)
        return super().run_node(n)


@torch.no_grad()
def moments(defender: Defender) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel over images and positions, float64 (channels,), by the layer's node, on the CPU."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for read in _passes(defender):
        for node, values in read.items():
            total, square, count = sums.get(node, (torch.zeros(()), torch.zeros(()), 0))
            values = values.double()
            sums[node] = (
                total + values.sum((0, 2)),
                square + values.square().sum((0, 2)),
                count + values.shape[0] * values.shape[2],
            )
    return {
        node: ((total / count).cpu(), (square / count - (total / count) ** 2).clamp(min=0).cpu())
        for node, (total, square, count) in sums.items()
    }


@torch.no_grad()
def largest(defender: Defender) -> dict[str, Tensor]:
    """The largest over the positions of each image, float32 (images, channels), by the layer's node, on the CPU."""
    passes = [{node: values.amax(2) for node, values in read.items()} for read in _passes(defender)]
    return {node: torch.cat([read[node] for read in passes]).cpu() for node in passes[0]}


def _passes(defender: Defender) -> Iterator[dict[str, Tensor]]:
    device = next(defender.neurons.graph.parameters()).device
    for batch in defender.images.split(min(BATCH, batch_size(defender.images))):
        reader = _Reader(defender)
        reader.run(batch.to(device, memory_format=torch.channels_last))
        yield reader.read
