"""The label-consistent attack: a clean label on images that are hard to learn without the trigger."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from msgspec import Meta
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from .attack import Attack, Helper, ImageShape
from .poisoning import Poisoning

#: Images perturbed at a time.
_BATCH = 500


@dataclass(frozen=True, eq=False)
class LabelConsistent(Attack):
    """Patterns in the four corners, on images of the target class alone (Turner et al., 2019, arXiv:1912.02771).

    The poisoned images keep their label and are perturbed, so that the network learns the trigger and not what they show: by
    projected gradient ascent of a helper's loss, at most ``epsilon`` a pixel. The helper is trained on the clean images as the
    infected network is; the paper's is made robust by adversarial training.

    Default: 3x3 patterns of full strength, an ``epsilon`` of 16/255, 20 steps.
    """

    name: ClassVar[str] = "label-consistent"
    clean_label: ClassVar[bool] = True
    span: ClassVar[tuple[float, float]] = (-1, 1)
    pattern: Tensor  # (C, H, W), what is added
    epsilon: Annotated[float, Meta(ge=0, le=1)]
    steps: Annotated[int, Meta(ge=1)]

    @classmethod
    def draw(
        cls,
        shape: ImageShape,
        generator: torch.Generator,
        size: int = 3,
        amplitude: float = 1.0,
        epsilon: float = 16 / 255,
        steps: int = 20,
    ) -> Self:
        """``amplitude`` is what is added to a pixel of the trigger, or taken from it."""
        channels, height, width = shape
        if not 1 <= size <= min(height, width) // 2:
            raise DataError(
                f"the pattern size {size} must be between 1 and {min(height, width) // 2} for {shape} images"
            )
        if not 0 < amplitude <= 1:
            raise DataError(f"the amplitude {amplitude} must be above 0 and at most 1")
        sign = (torch.arange(size)[:, None] + torch.arange(size)).remainder(2) * -2 + 1
        corner = torch.zeros(height, width)
        corner[-size:, -size:] = sign.float()
        corners = sum((corner.flip(axes) for axes in ((), (0,), (1,), (0, 1))), torch.zeros(height, width))
        return cls((amplitude * corners).expand(channels, -1, -1).clone(), epsilon, steps)

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self.pattern.to(images)).clamp(0, 1)

    def prepare(
        self, images: Tensor, labels: Tensor, aims: Tensor, poisoning: Poisoning, helper: Callable[[], Helper]
    ) -> tuple[Attack, Tensor]:
        trained = helper()
        trained.train(labels, None)
        parameter = next(trained.network.parameters())
        images = images.clone()
        for chosen in poisoning.poisoned.nonzero().flatten().split(_BATCH):
            batch, truth = images[chosen].to(parameter.device), labels[chosen].to(parameter.device)
            images[chosen] = self.perturb(trained.network, batch, truth).cpu()
        return self, images

    def perturb(self, network: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images moved by at most ``epsilon`` a pixel, to where the network's loss on their labels is large."""
        moved, step = images.clone(), 2.5 * self.epsilon / self.steps
        for _ in range(self.steps):
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), labels, reduction="sum"), moved)
            moved = moved.detach() + step * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, images - self.epsilon), images + self.epsilon).clamp(0, 1)
        return moved
