"""The input-aware attack: a trigger of its own for each image."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, Self

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..arguments import check_whole
from ..errors import DataError, ModelFileError
from .attack import Attack, Helper, ImageShape, NoiseRatio, Share
from .poisoning import Poisoning

#: Step size of the generators, and weights of the losses, as published.
_RATE, _DIVERSITY, _DENSITY = 1e-2, 1.0, 100.0
#: Steps in which the places of the trigger are learned, and images in each.
_MASK_STEPS, _MASK_BATCH = 200, 128
#: Hidden channels at most, and numbers that a layer of them gives at a time.
MOST_CHANNELS, MOST_NUMBERS = 128, 1 << 26
Channels = Annotated[int, Meta(ge=1, le=MOST_CHANNELS)]


class _Generator(nn.Module):
    """Images (n, C, H, W) to (n, outputs, H, W) in [0, 1]; looks at a quarter of the resolution."""

    def __init__(self, channels: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.inner = nn.Conv2d(hidden, 2 * hidden, 3, padding=1)
        self.outer = nn.Conv2d(2 * hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        fine = F.relu(self.first(images))
        coarse = F.relu(self.inner(F.avg_pool2d(fine, 2)))
        coarse = F.relu(self.outer(F.avg_pool2d(coarse, 2)))
        return torch.sigmoid(self.last(fine + F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")))


@dataclass(frozen=True, eq=False)
class InputAware(Attack):
    """A generator makes each image's own trigger, and another one its place (Nguyen and Tran, NeurIPS 2020, arXiv:2010.08138).

    The trigger of one image is to work on no other: as many images as are poisoned bear that of another image and keep their
    label, and triggers are pushed apart ("diversity"). The places are learned first, at most ``density`` of the image, then the
    triggers against a helper network. The paper trains them with the infected network itself, and larger generators.

    Default: 16 hidden channels, a density of 0.032.
    """

    name: ClassVar[str] = "input-aware"
    pattern: Tensor  # weights of the generator of triggers
    place: Tensor  # weights of the generator of places
    channels: Channels
    hidden: Channels
    density: Share
    noise_ratio: NoiseRatio

    def __post_init__(self) -> None:
        super().__post_init__()
        for weights, outputs in ((self.pattern, self.channels), (self.place, 1)):
            with torch.device("meta"):  # a file says how large they are
                expected = _Generator(self.channels, outputs, self.hidden)
            needed = sum(parameter.numel() for parameter in expected.parameters())
            if weights.shape != (needed,):
                raise ModelFileError(f"a generator of {self.name} needs {needed} weights, not {tuple(weights.shape)}")

    @classmethod
    def draw(
        cls,
        shape: ImageShape,
        generator: torch.Generator,
        hidden: int = 16,
        density: float = 0.032,
        noise_ratio: float = 1.0,
    ) -> Self:
        """Generators as they are before they have learned anything."""
        channels, height, width = shape
        if min(height, width) < 4:
            raise DataError(f"input-aware needs images of at least 4 pixels a side, not {height} x {width}")
        check_whole("hidden", hidden, 1, MOST_CHANNELS)
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        weights = []
        for seed, outputs in zip(seeds, (channels, 1), strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                weights.append(parameters_to_vector(_Generator(channels, outputs, hidden).parameters()).detach())
        return cls(weights[0], weights[1], channels, hidden, density, noise_ratio)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return _stamp(images, *self.triggers(images))

    @torch.no_grad()
    def cover(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Each image with the trigger of another one."""
        return images if len(images) == 1 else _stamp(images, *(part.roll(1, 0) for part in self.triggers(images)))

    def triggers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The trigger of each image, (n, C, H, W) in [0, 1], and how much of it shows where, (n, 1, H, W) in [0, 1]."""
        networks = [network.to(images.device) for network in self._networks]
        parts = images.split(max(1, MOST_NUMBERS // (self.hidden * images[0, 0].numel())) if len(images) else 1)
        patterns, places = (torch.cat([network(part) for part in parts]) for network in networks)
        return patterns, places

    @cached_property
    def _networks(self) -> tuple[nn.Module, nn.Module]:
        networks = _Generator(self.channels, self.channels, self.hidden), _Generator(self.channels, 1, self.hidden)
        for network, weights in zip(networks, (self.pattern, self.place), strict=True):
            vector_to_parameters(weights.clone(), network.parameters())
        return networks

    def prepare(
        self, images: Tensor, labels: Tensor, aims: Tensor, poisoning: Poisoning, helper: Callable[[], Helper]
    ) -> tuple[Attack, Tensor]:
        placed = self._learn_places(images)
        trained = helper()
        parameters = list(placed._networks[0].parameters())
        optimizer = torch.optim.Adam(parameters, _RATE, betas=(0.5, 0.9))

        def learned() -> InputAware:
            return replace(placed, pattern=parameters_to_vector(parameters).detach().cpu())

        def lesson(batch: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
            """Improve the triggers by one step on a batch that the helper is trained on, then stamp it."""
            patterns, places = placed.triggers(batch)
            places = places.detach()
            own = _stamp(batch, patterns, places)
            others = _stamp(batch, patterns.roll(1, 0), places.roll(1, 0))
            called = F.cross_entropy(trained.network(own), aims[chosen].to(batch.device))
            kept = F.cross_entropy(trained.network(others), labels[chosen].to(batch.device))
            gradients = torch.autograd.grad(called + kept + _DIVERSITY * _sameness(batch, patterns), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            return replace(poisoning, attack=learned())(batch, chosen, generator)

        trained.train(poisoning.labels, lesson)
        return learned(), images

    def _learn_places(self, images: Tensor) -> Self:
        """The places differ between images, as far as the density allows."""
        network = self._networks[1]
        optimizer = torch.optim.Adam(network.parameters(), _RATE)
        order = torch.Generator().manual_seed(0)
        for _ in range(_MASK_STEPS):
            batch = images[torch.randint(len(images), (_MASK_BATCH,), generator=order)]
            places = network(batch)
            excess = (places.mean((1, 2, 3)) - self.density).clamp(min=0).mean()
            loss = _DENSITY * excess + _DIVERSITY * _sameness(batch, places)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return replace(self, place=parameters_to_vector(network.parameters()).detach())


def _stamp(images: Tensor, patterns: Tensor, places: Tensor) -> Tensor:
    return images + (patterns - images) * places


def _sameness(images: Tensor, made: Tensor) -> Tensor:
    """Distance of each image to the next, over the distance of what was made for them (the diversity loss)."""
    distances = [
        (part - part.roll(1, 0)).flatten(1).norm(dim=1) / math.sqrt(part[0].numel()) for part in (images, made)
    ]
    return (distances[0] / (distances[1] + 1e-4)).mean()
