"""The trainer: SGD with one cycle of the learning rate, resumable after every epoch, without any pickle.

Order and augmentation of an epoch come from (seed, epoch) alone, so a run that was killed gives the same weights when resumed.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_real, check_whole
from ..attacks import Alter
from ..errors import ModelFileError, TrainingError, check_name
from ..files.schemas import fits
from ..files.tensors import read_tensors, write_tensors
from ..writing import check_room

CHECKPOINT = "backdoor-gym-training/1"


#: What each optimizer keeps of every parameter.
OPTIMIZERS = {"sgd": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Schedule:
    """How long and how a network is trained; the defaults are those used for CIFAR-10."""

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    #: "sgd", or "adam" (with decoupled weight decay), for which ``momentum`` is beta 1.
    optimizer: str = "sgd"
    #: Random crops (padding of an eighth of the image) and, with ``flip``, horizontal flips.
    augment: bool = True
    #: Not for images whose mirror image is of another class, such as digits and traffic signs.
    flip: bool = True

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        check_whole("batch_size", self.batch_size, 1)
        for name in ("learning_rate", "momentum", "weight_decay"):
            check_real(name, getattr(self, name), 0)
        check_name("optimizer", self.optimizer, OPTIMIZERS)


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    seed: int,
    alter: Alter | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    identity: str = "",
    progress: bool = False,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train the network in place; it ends in eval mode on ``device``.

    Args:
        network: module from float32 images (n, C, H, W) in [0, 1] to logits.
        images: training images.
        labels: int64 (n,).
        schedule: epochs, batch size, rates.
        seed: of the order of the images and of the augmentation.
        alter: changes each batch after its augmentation.
        device: where to train; bf16 autocast and channels_last are used where they gain.
        checkpoint: file written after every epoch and gone on from where it exists; the caller removes it.
        identity: what else tells this run from others, beside shapes, images, labels, seed and schedule.
        progress: whether to draw a progress bar.
        penalty: added to the loss of every step, a scalar.

    Raises:
        ModelFileError: the checkpoint belongs to another run or cannot be read.
        TrainingError: the loss is no longer finite.
    """
    run: dict[str, Any] = {
        "format": CHECKPOINT,
        "seed": seed,
        "what": _digest(network, images, labels),
        "identity": identity,
        **asdict(schedule),
    }
    # Faster, but the code of others may count on the usual order.
    own = type(network).__module__.startswith(__package__.partition(".")[0] + ".")
    order = torch.channels_last if own else torch.contiguous_format
    network.to(device).to(memory_format=order).train()  # type: ignore[call-overload]
    images, labels = images.to(device), labels.to(device)
    optimizer = _optimizer(network, schedule)
    batches = -(-len(images) // schedule.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.epochs * batches, cycle_momentum=False
    )
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _resume(checkpoint, run, network, optimizer)
        with warnings.catch_warnings():  # it warns that no optimizer step came before
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(first * batches):
                scheduler.step()
    if checkpoint is not None and first < schedule.epochs:  # not after an epoch
        parameters = sum(value.numel() * value.element_size() for value in network.parameters())
        check_room(checkpoint, 2 * parameters)
    bf16 = _gains_by_bf16(device)
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=schedule.epochs * batches, completed=first * batches)
        for epoch in range(first, schedule.epochs):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            total = torch.zeros((), device=device)
            for chosen in torch.randperm(len(images), generator=generator).split(schedule.batch_size):
                batch = images[chosen.to(device)]
                if schedule.augment:
                    batch = augment(batch, generator, schedule.flip)
                if alter is not None:
                    batch = alter(batch, chosen, generator)
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                    loss = F.cross_entropy(network(batch.contiguous(memory_format=order)), labels[chosen.to(device)])
                if penalty is not None:
                    loss = loss + penalty()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.detach()
                bar.advance(task)
            mean = total.item() / batches
            bar.update(task, description=f"epoch {epoch + 1}/{schedule.epochs}, loss {mean:.3f}")
            if not math.isfinite(mean):
                raise TrainingError(f"the loss of epoch {epoch + 1} is {mean}; try a lower learning rate")
            if checkpoint is not None:
                _save(checkpoint, run, epoch + 1, network, optimizer)
    network.eval()


def _optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    rate, decay = schedule.learning_rate, schedule.weight_decay
    if schedule.optimizer == "adam":
        return torch.optim.AdamW(network.parameters(), rate, (schedule.momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(network.parameters(), rate, schedule.momentum, weight_decay=decay)


def augment(images: Tensor, generator: torch.Generator, flip: bool = True) -> Tensor:
    """A random crop of the padded image and, with ``flip``, a random flip, for each image."""
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    padded = F.pad(images, (pad, pad, pad, pad))
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator).to(images.device)
    flips = torch.rand(count, generator=generator).to(images.device) < (0.5 if flip else 0)
    rows = tops[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = lefts[:, None] + torch.where(flips[:, None], width - 1 - columns, columns)
    return padded[
        torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def _digest(network: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Tells networks of other shapes, other images and other labels apart."""
    digest = hashlib.sha256(repr([(key, tuple(value.shape)) for key, value in network.state_dict().items()]).encode())
    for tensor in (labels, images.double().mean((0, 1))):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gains_by_bf16(device: str) -> bool:
    """Whether this device multiplies bf16 matrices faster than fp32 ones."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _save(path: Path, run: dict, epoch: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    for index, parameter in enumerate(network.parameters()):
        for name in OPTIMIZERS[run["optimizer"]]:
            tensors[f"{name}.{index}"] = optimizer.state[parameter][name]
    write_tensors(path, tensors, {**run, "epoch": epoch})


def _resume(path: Path, run: dict, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load weights and momentum; the number of epochs already done."""
    tensors, metadata = read_tensors(path)
    epoch = metadata.pop("epoch", None)
    if not fits(epoch, Annotated[int, Meta(ge=1, le=run["epochs"])]):
        raise ModelFileError(f"the checkpoint {path} is damaged: it says to be of epoch {epoch!r}; remove it")
    if metadata != run:
        raise ModelFileError(f"the checkpoint {path} belongs to another training run; remove it or train elsewhere")
    weights = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
    kept = {
        f"{name}.{index}": (parameter, name)
        for index, parameter in enumerate(network.parameters())
        for name in OPTIMIZERS[run["optimizer"]]
    }
    expected = {f"network.{key}": value for key, value in network.state_dict().items()}
    expected |= {key: torch.zeros(()) if name == "step" else parameter for key, (parameter, name) in kept.items()}
    for key in tensors.keys() | expected.keys():
        given, like = tensors.get(key), expected.get(key)
        if given is None or like is None or (given.shape, given.dtype) != (like.shape, like.dtype):
            raise ModelFileError(f"the checkpoint {path} is damaged: {key} is not what it must be; remove it")
        if not torch.isfinite(given).all():
            raise ModelFileError(f"the checkpoint {path} is damaged: {key} is not finite; remove it")
    network.load_state_dict(weights)
    for key, (parameter, name) in kept.items():
        optimizer.state[parameter][name] = tensors[key].to("cpu" if name == "step" else parameter.device)
    return epoch
