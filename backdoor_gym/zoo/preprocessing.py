"""What stands in front of a network that does not take images in [0, 1] as they are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import DataError
from .adapting import find_logits, pick_logits


class Preprocess(nn.Module):
    """Any callable as a layer that is called, not traced: what it does to the images is no part of the network.

    It is given float32 (n, C, H, W) in [0, 1] on the network's device, a copy that it may overwrite, and gives what the network
    takes, n of them in the same order. It must do the same each time: nothing random.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images.clone())


def as_they_are(images: Tensor) -> Tensor:
    """The images."""
    return images


class Preprocessed(nn.Module):
    """A network behind a ``Preprocess``, whose answer may have parts: from images in [0, 1] to logits.

    Args:
        preprocess: what makes of images in [0, 1] what the network takes.
        network: it gives logits, or an answer in which they are.
        entry: where they are in the answer (``adapting.find_logits``); None for logits alone.
    """

    #: Where the network stands in it.
    PREFIX = "network."

    def __init__(
        self, preprocess: Callable[[Tensor], Tensor], network: nn.Module, entry: str | int | None = None
    ) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocess)
        self.network = network
        self.entry = entry

    def forward(self, images: Tensor) -> Tensor:
        return pick_logits(self.network(self.preprocess(images)), self.entry)


def giving_logits(network: nn.Module, images: Tensor, classes: int = 1) -> nn.Module:
    """The network, or one around it that gives logits (n, classes) where its answer is another one.

    Args:
        network: maybe ``Preprocessed``, whose ``entry`` is then set.
        images: two that it takes, float32 (2, C, H, W).
        classes: how many there are at least.

    Raises:
        DataError: no logits are found in the answer.
    """
    with torch.no_grad():
        answer = (
            network.network(network.preprocess(images))
            if isinstance(network, Preprocessed)
            else network(images.clone())
        )
    entry = find_logits(answer, classes)
    logits = pick_logits(answer, entry)
    if not logits.is_floating_point():
        raise DataError(
            f"the network gives labels ({str(logits.dtype).removeprefix('torch.')}), not logits: leave argmax out of its forward"
        )
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1):
        raise DataError(
            "the network gives a single logit, as with a sigmoid behind it; classes need one each: of two classes they are "
            "torch.cat([-logit, logit], 1) / 2, with the same answers"
        )
    if isinstance(network, Preprocessed):
        network.entry = entry
        return network
    if entry is None and answer.ndim == 2:
        return network
    return Preprocessed(as_they_are, network, entry)


class Normalise(nn.Module):
    """(image - mean) / std, channel by channel.

    Args:
        mean: of each channel, for images in [0, 1].
        std: of each channel.

    Raises:
        DataError: not one mean and one positive deviation a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            try:
                tensor = torch.tensor([float(value) for value in values])
            except (TypeError, ValueError) as error:
                raise DataError(f"the {name} must be numbers, one a channel, not {values!r}") from error
            self.register_buffer(name, tensor.view(-1, 1, 1), persistent=False)
        usable = bool(torch.isfinite(self.mean).all() and ((self.std > 0) & torch.isfinite(self.std)).all())
        if not len(self.mean) == len(self.std) > 0 or not usable:
            raise DataError(
                f"a normalisation takes one finite mean and one positive std a channel, not {list(mean)} and {list(std)}"
            )

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def state(self) -> dict[str, list[float]]:
        """The arguments, JSON-able."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}


def own_module(network: nn.Module) -> nn.Module:
    """The network without what stands in front of it."""
    return network.network if isinstance(network, Preprocessed) else network
