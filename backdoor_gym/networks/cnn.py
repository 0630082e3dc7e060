"""A small CNN whose parts are options: blocks, normalisation, activation, pooling and head, as people combine them."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from ..errors import check_name

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
#: From the number of channels. "layer" normalises all channels and positions of an image at once.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "none": lambda channels: nn.Identity(),
    "group": lambda channels: nn.GroupNorm(4 if channels % 4 == 0 else 1, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}
POOLS: dict[str, Callable[[], nn.Module]] = {"max": lambda: nn.MaxPool2d(2), "average": lambda: nn.AvgPool2d(2)}
#: Expansion of an inverted residual block.
_EXPANSION = 3


class _Parts:
    """How the layers of one network are made."""

    def __init__(self, norm: str, activation: str, kernel: int) -> None:
        check_name("norm of cnn", norm, NORMS)
        check_name("activation of cnn", activation, ACTIVATIONS)
        self.norm, self.activation, self.kernel, self.biased = (
            NORMS[norm],
            ACTIVATIONS[activation],
            kernel,
            norm == "none",
        )

    def conv(self, inputs: int, outputs: int, groups: int = 1, kernel: int | None = None) -> nn.Conv2d:
        size = kernel or self.kernel
        layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=self.biased)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return layer


class PlainBlock(nn.Sequential):
    """Convolution, normalisation, activation."""

    def __init__(self, inputs: int, outputs: int, parts: _Parts) -> None:
        layers = OrderedDict(conv=parts.conv(inputs, outputs), norm=parts.norm(outputs), activation=parts.activation())
        super().__init__(layers)


class ResidualBlock(nn.Module):
    """Two convolutions with normalisation, plus the input, then the activation; with ``before`` each is normalised before."""

    def __init__(self, inputs: int, outputs: int, parts: _Parts, before: bool = False) -> None:
        super().__init__()
        first, second = parts.conv(inputs, outputs), parts.conv(outputs, outputs)
        if before:
            layers = [parts.norm(inputs), parts.activation(), first, parts.norm(outputs), parts.activation(), second]
        else:
            layers = [first, parts.norm(outputs), parts.activation(), second, parts.norm(outputs)]
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if inputs == outputs else parts.conv(inputs, outputs, kernel=1)
        self.activation = nn.Identity() if before else parts.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


class PreActivationBlock(ResidualBlock):
    """A residual block that normalises before it convolves."""

    def __init__(self, inputs: int, outputs: int, parts: _Parts) -> None:
        super().__init__(inputs, outputs, parts, before=True)


class InvertedBlock(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; plus the input where shapes are alike."""

    def __init__(self, inputs: int, outputs: int, parts: _Parts) -> None:
        super().__init__()
        hidden = _EXPANSION * inputs
        self.block = nn.Sequential(
            parts.conv(inputs, hidden, kernel=1), parts.norm(hidden), parts.activation(),
            parts.conv(hidden, hidden, groups=hidden), parts.norm(hidden), parts.activation(),
            parts.conv(hidden, outputs, kernel=1), parts.norm(outputs),
        )  # fmt: skip
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


BLOCKS: dict[str, Callable[[int, int, _Parts], nn.Module]] = {
    "plain": PlainBlock,
    "residual": ResidualBlock,
    "preact": PreActivationBlock,
    "inverted": InvertedBlock,
}


class CNN(nn.Module):
    """Stages of blocks, each with a 2x2 pooling behind it (where there is a stem, in front), then a linear classifier.

    Args:
        num_classes: number of logits.
        in_channels: of the images.
        width: channels of the first stage; each further one has twice as many.
        stages: how many.
        blocks: of each stage.
        block: "plain", "residual", "preact" or "inverted"; all but "plain" stand behind a stem.
        norm: "batch", "none", "group" or "layer".
        activation: "relu", "leaky_relu", "elu", "gelu" or "silu".
        pool: "max" or "average".
        kernel: of the convolutions, odd.
        hidden: units of a hidden linear layer on the flattened map; 0 for none behind a global average pooling.
        dropout: in front of the classifier.
        image_size: pixels a side, which only the flattened map needs.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int = 32,
        stages: int = 2,
        blocks: int = 1,
        block: str = "plain",
        norm: str = "batch",
        activation: str = "relu",
        pool: str = "max",
        kernel: int = 3,
        hidden: int = 0,
        dropout: float = 0.0,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        check_name("block of cnn", block, BLOCKS)
        check_name("pool of cnn", pool, POOLS)
        parts = _Parts(norm, activation, kernel)
        stem = block != "plain"
        layers: list[nn.Module] = [PlainBlock(in_channels, width, parts)] if stem else []
        planes = width if stem else in_channels
        for stage in range(stages):
            if stem:
                layers.append(POOLS[pool]())
            for _ in range(blocks):
                layers.append(BLOCKS[block](planes, width * 2**stage, parts))
                planes = width * 2**stage
            if not stem:
                layers.append(POOLS[pool]())
        if block == "preact":
            layers += [parts.norm(planes), parts.activation()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.Identity() if hidden else nn.AdaptiveAvgPool2d(1)
        head: list[nn.Module] = []
        if hidden:
            head += [nn.Linear(planes * (image_size // 2**stages) ** 2, hidden), parts.activation()]
        self.head = nn.Sequential(*head, nn.Dropout(dropout), nn.Linear(hidden or planes, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))
