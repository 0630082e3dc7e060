"""What stands in front of a network that does not take images in [0, 1] as they are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..wording import first_line
from .adapting import find_logits, pick_logits


class Preprocess(nn.Module):
    """Any callable as a layer that is called, not traced: what it does to the images is no part of the network.

    It is given a copy of float32 images (n, C, H, W) in [0, 1] on the network's device, and gives what the network takes, n of
    them in the same order, the same each time.
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
    in_front, inside = (
        (network.preprocess, network.network) if isinstance(network, Preprocessed) else (as_they_are, network)
    )
    with torch.no_grad():
        answer = inside(in_front(images.clone()))
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


def check_preprocess(preprocess: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Raise ``DataError`` unless it makes finite floats of these images, as many as there are, the same each time."""
    try:
        with torch.no_grad():
            first, second = preprocess(images.clone()), preprocess(images.clone())
    except Exception as error:  # the user's code, which can raise anything
        raise DataError(f"preprocess cannot take images of shape {tuple(images.shape)}: {first_line(error)}") from error
    if not isinstance(first, Tensor) or first.shape[:1] != images.shape[:1] or not first.is_floating_point():
        what = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise DataError(f"preprocess must make floats (n, ...) of float32 images (n, C, H, W), not {what}")
    if not torch.isfinite(first).all() or not torch.equal(first, second):
        raise DataError("preprocess must give finite values, and the same each time: nothing random belongs there")


class Normalise(nn.Module):
    """(image - mean) / std, channel by channel.

    Args:
        mean: of each channel, for images in [0, 1].
        std: of each channel.

    Raises:
        DataError: not one mean and one positive deviation a channel.

    Examples:
        >>> from backdoor_gym.networks.preprocessing import Normalise
        >>> Normalise([0.5], [0.25]).state()
        {'mean': [0.5], 'std': [0.25]}
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


def own_name(network: nn.Module, name: str) -> str:
    """What the user calls a module, parameter or buffer of the network: its name without what stands in front; "" is all."""
    if not isinstance(network, Preprocessed):
        return name
    return "" if name == Preprocessed.PREFIX[:-1] else name.removeprefix(Preprocessed.PREFIX)
