"""The figures of backdoor removal: ACC, ASR, RA and DER.

ACC is the accuracy on clean test images. ASR and RA are taken over triggered test images whose true label is not the
target: the share that gets the target label, and the share that still gets its true label. In an all-to-all attack the
target label of an image is the class after its own, so all images count.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .attacks.targets import Target, target_labels
from .errors import WeightsError

#: Images that a network is given at a time, and pixels of a channel of all of them.
BATCH_SIZE, MOST_PIXELS = 500, 1 << 25


@dataclass(frozen=True)
class Metrics:
    """Shares in [0, 1]; ``asr`` and ``ra`` are None where no trigger is known, ``acc`` where there are no test images."""

    acc: float | None
    asr: float | None = None
    ra: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """JSON-able form."""
        return asdict(self)


def require_finite(what: str, *values: Tensor) -> None:
    """Find out before they are used that numbers overflowed: NaN and infinity spread, and some of PyTorch crashes on them.

    Raises:
        WeightsError: one is NaN or infinite; ``what`` says of what.
    """
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise WeightsError(f"{what} is not finite: the network's weights are damaged, or far too large")


def batch_size(images: Tensor) -> int:
    """How many of the images (n, C, H, W) a network is given at a time: large ones are fewer."""
    return max(2, min(BATCH_SIZE, MOST_PIXELS // images[0, 0].numel()))


@torch.no_grad()
def predict_logits(network: nn.Module, images: Tensor, on_batch: Callable[[int], None] | None = None) -> Tensor:
    """Logits (n, classes) of float32 images (n, C, H, W), on the network's device, returned on the CPU.

    ``on_batch`` is told how many there are so far.
    """
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    network.eval()
    logits: list[Tensor] = []
    batches = list(images.split(batch_size(images)))
    if len(batches) > 1 and len(batches[-1]) == 1:  # some networks cannot take a single image
        batches[-2:] = [torch.cat(batches[-2:])]
    for batch in batches:
        # A copy, as a network may work in place on what it is given, and contiguous, as everybody runs it.
        given = torch.cat([batch, batch]) if len(batch) == 1 else batch.clone(memory_format=torch.contiguous_format)
        logits.append(network(given.to(device)).float().cpu()[: len(batch)])
        if on_batch is not None:
            on_batch(sum(map(len, logits)))
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is at their label."""
    return (logits.argmax(1) == labels).double().mean().item()


def attack_success(logits: Tensor, target: int | Tensor) -> float:
    """ASR: share of triggered images (of other classes) that get the target label, one for all or one each, int64 (n,)."""
    return (logits.argmax(1) == target).double().mean().item()


def target_margin(logits: Tensor, target: int | Tensor) -> Tensor:
    """Logit of the target, one for all images or one each, int64 (n,), minus the largest other one, (n,)."""
    column = torch.as_tensor(target, device=logits.device).expand(len(logits))[:, None]
    others = logits.scatter(1, column, -torch.inf)
    return logits.gather(1, column).squeeze(1) - others.max(1).values


def danger(logits: Tensor, target: int | Tensor) -> float:
    """A smoother ASR in [0, 1]: (ASR + mean sigmoid(margin / 4)) / 2, with the target's margin over the best other logit.

    Where the target leads by far, the ASR alone does not move until the last of many prunes.
    """
    margin = target_margin(logits, target)
    return (attack_success(logits, target) + torch.sigmoid(margin / 4).double().mean().item()) / 2


def der(acc_before: float, asr_before: float, acc_after: float, asr_after: float) -> float:
    """Defence effectiveness rating in [0, 1]: (max(0, dASR) - max(0, dACC) + 1) / 2 (Zhu et al., ICCV 2023, section 4.1).

    dASR and dACC are how much ASR and ACC fell.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2


def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    trigger: Callable[[Tensor], Tensor] | None = None,
    target: Target | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Metrics:
    """ACC on the images, and ASR and RA where the trigger and the target are known.

    Args:
        network: module from images to logits.
        images: float32 (n, C, H, W) in [0, 1], not used for training or by the defender.
        labels: int64 (n,).
        trigger: stamps the trigger on images.
        target: the attacker's label, or "all-to-all".
        on_batch: told how many answers the network has given, and of how many.
    """

    def count(before: int) -> Callable[[int], None] | None:
        whole = len(images) if trigger is None else 2 * len(images)
        return None if on_batch is None else lambda done: on_batch(before + done, whole)

    clean_logits = predict_logits(network, images, on_batch=count(0))
    acc = accuracy(clean_logits, labels)
    if trigger is None or target is None:
        return Metrics(acc)
    targets = target_labels(labels, target, clean_logits.shape[1])
    others = labels != targets
    if not others.any():
        return Metrics(acc)
    logits = predict_logits(network, trigger(images[others]), on_batch=count(len(images)))
    return Metrics(acc, attack_success(logits, targets[others]), accuracy(logits, labels[others]))
