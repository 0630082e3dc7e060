"""A multi-layer perceptron: hidden linear layers with ReLU, no normalisation."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Flattened images, ``depth`` hidden layers of ``width`` units, one linear classifier."""

    def __init__(self, num_classes: int, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.hidden = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.hidden(x.flatten(1)))


def mlp(num_classes: int = 10, in_channels: int = 3, width: int = 512, depth: int = 2, image_size: int = 32) -> MLP:
    """A perceptron for square images of ``image_size`` pixels a side."""
    return MLP(num_classes, in_channels * image_size**2, width, depth)
