"""What an attack is: a trigger that is stamped on images, and that can be saved.

Images are float32 tensors of shape (n, C, H, W) in [0, 1]. An attack is immutable; everything random about its trigger
is drawn once by ``draw`` and kept, so that a saved attack stamps the very same trigger again.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

ImageShape = tuple[int, int, int]


class Attack(ABC):
    """A trigger: calling it on images stamps them. Fields that are tensors are saved as tensors, the others as JSON."""

    name: ClassVar[str]
    #: Images per poisoned image that are altered at random and keep their label, so that only the true trigger works.
    noise_ratio: float = 0.0

    #: ``draw(shape, generator, **parameters)``: the attack for images of this shape; its random parts come from the
    #: generator, and parameters that are not given have the published defaults.
    draw: ClassVar[Callable[..., "Attack"]]

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Triggered copies of the images, float32 (n, C, H, W) in [0, 1]."""

    def cover(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images altered at random that keep their label; asked for where ``noise_ratio`` is above zero."""
        raise TypeError(f"{self.name} has no such images")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able parameters and tensors, from which ``attack_from_state`` makes the same attack."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        return {key: value for key, value in values.items() if key not in tensors}, tensors

    def digest(self) -> str:
        """Tells triggers apart."""
        parameters, tensors = self.state()
        digest = hashlib.sha256(repr((self.name, sorted(parameters.items()))).encode())
        for key in sorted(tensors):
            digest.update(tensors[key].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
