"""A multi-layer perceptron: hidden linear layers with ReLU, no normalisation."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Square images of ``image_size`` pixels a side, ``depth`` hidden layers of ``width`` units, one linear classifier."""

    def __init__(
        self, num_classes: int, in_channels: int, width: int = 512, depth: int = 2, image_size: int = 32
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels * image_size**2
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.hidden = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.hidden(x.flatten(1)))
