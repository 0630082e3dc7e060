"""Vision transformer (Dosovitskiy et al., 2021), pre-norm, with the usual checkpoint names."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..errors import DataError


class EncoderBlock(nn.Module):
    """LN and self-attention plus the input, then LN and two linear layers with GELU between plus the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * width, width), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        attended, _ = self.self_attention(normed, normed, normed, need_weights=False)
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Position embeddings, blocks, LN."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, width).normal_(std=0.02))
        self.layers = nn.Sequential(
            OrderedDict((f"encoder_layer_{index}", EncoderBlock(width, heads)) for index in range(depth))
        )
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(x + self.pos_embedding))


class VisionTransformer(nn.Module):
    """Patches as tokens of ``width`` channels, a class token, an encoder, one linear classifier on the class token.

    Images are square, of ``image_size`` pixels a side.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        patch: int = 4,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise DataError(
                f"images of {image_size} pixels do not divide into patches of {patch}, or {width} channels into {heads} heads"
            )
        self.conv_proj = nn.Conv2d(in_channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder((image_size // patch) ** 2 + 1, width, depth, heads)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv_proj(x).flatten(2).transpose(1, 2)
        first = self.class_token.expand(tokens.shape[0], -1, -1)
        return self.heads(self.encoder(torch.cat([first, tokens], dim=1))[:, 0])


def vit_b_16(
    num_classes: int, in_channels: int, width: int = 768, patch: int = 16, image_size: int = 224
) -> VisionTransformer:
    """ViT-B/16: twelve blocks, heads of 64 channels."""
    return VisionTransformer(num_classes, in_channels, width, 12, max(1, width // 64), patch, image_size)
