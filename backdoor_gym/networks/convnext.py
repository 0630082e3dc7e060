"""ConvNeXt (Liu et al., 2022): depthwise 7x7 convolutions and layer normalisation; with the usual checkpoint names."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of the channels of images (n, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Block(nn.Module):
    """Depthwise 7x7 convolution, LN, two linear layers with GELU between, scaled by channel, plus the input."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((planes, 1, 1), 1e-6))
        self.block = nn.Sequential(
            nn.Conv2d(planes, planes, 7, padding=3, groups=planes),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(planes, eps=1e-6),
            nn.Linear(planes, 4 * planes),
            nn.GELU(),
            nn.Linear(4 * planes, planes),
            Permute(0, 3, 1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
    """A stem of patches, stages of blocks with LN and a halving convolution between, one linear classifier."""

    def __init__(self, blocks: tuple[int, ...], num_classes: int, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(in_channels, width, patch, patch), LayerNorm2d(width, eps=1e-6))
        ]
        planes = width
        for stage, count in enumerate(blocks):
            if stage:
                layers.append(nn.Sequential(LayerNorm2d(planes, eps=1e-6), nn.Conv2d(planes, 2 * planes, 2, stride=2)))
                planes *= 2
            layers.append(nn.Sequential(*(Block(planes) for _ in range(count))))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(planes, eps=1e-6), nn.Flatten(1), nn.Linear(planes, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # The published standard deviation of 0.02 is for wide networks and AdamW: narrow ones do not learn from it by SGD.
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


def convnext_tiny(num_classes: int, in_channels: int, width: int = 96, patch: int = 4) -> ConvNeXt:
    """ConvNeXt-T; patches of ``patch`` pixels a side (4 as published; 1 or 2 suit small images)."""
    return ConvNeXt((3, 3, 9, 3), num_classes, in_channels, width, patch)


def convnext(num_classes: int, in_channels: int, width: int = 48, patch: int = 1, depth: int = 2) -> ConvNeXt:
    """A smaller one for small images: three stages of ``depth`` blocks."""
    network = ConvNeXt((depth,) * 3, num_classes, in_channels, width, patch)
    for module in network.modules():
        if isinstance(module, Block):
            nn.init.constant_(module.layer_scale, 0.1)  # the published 1e-6 is for very long training
    return network
