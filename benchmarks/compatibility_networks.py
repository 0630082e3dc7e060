"""Where the networks of ``compatibility.py`` come from: drawn from three packages, built, and given weights and images.

As a script it prints which networks are drawn, as JSON. Nothing is downloaded.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
#: Of each family the first network within both bounds is drawn, or the one with the fewest parameters where none is.
PARAMETERS, LAYERS = 30_000_000, 400
#: Larger networks are not built: each is held several times, in float64 too.
MOST_PARAMETERS = 150_000_000
#: Input sizes that are tried, up to the network's own: the first that the network itself answers is taken.
SIZES = (96, 128, 160, 192, 224, 256)
IMAGES, CLEAN_IMAGES = 2, 8
STUBS = str(Path(__file__).parent / "stubs")


class NotBuiltError(Exception):
    """The package itself does not make a classifier of images; nothing that this benchmark is about."""


# ---- drawing


def first_fitting(names: Iterable[str], measure: Callable[[str], tuple[int, int] | None]) -> str:
    """The network that stands for a family: parameters and layers alone decide, never what becomes of it.

    Args:
        names: of the family's networks, in any order.
        measure: parameters and weighted layers of one; None where it cannot be built, which ends the search: it is drawn.
    """
    sizes: dict[str, int] = {}
    for name in sorted(names):
        measured = measure(name)
        if measured is None:
            return name
        if measured[0] <= PARAMETERS and measured[1] <= LAYERS:
            return name
        sizes[name] = measured[0]
    return min(sizes, key=lambda name: (sizes[name], name))


def draw() -> list[dict[str, str]]:
    """All networks: one a timm module, one a pytorchcv module, one a transformers configuration."""
    import pytorchcv.model_provider as pytorchcv
    import timm
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CONFIGURATIONS

    drawn = []
    for module in timm.list_modules():
        drawn.append(("timm", module, first_fitting(timm.list_models(module=module), _measure(timm.create_model))))
    families: dict[str, list[str]] = {}
    for name, make in pytorchcv._models.items():
        families.setdefault(make.__module__.rpartition(".")[2], []).append(name)
    for family in sorted(families):
        drawn.append(("pytorchcv", family, first_fitting(families[family], _measure(pytorchcv.get_model))))
    drawn += [("transformers", name, name) for name in sorted(CONFIGURATIONS)]
    return [{"package": package, "family": family, "name": name} for package, family, name in drawn]


def _measure(make: Callable[..., nn.Module]) -> Callable[[str], tuple[int, int] | None]:
    def measure(name: str) -> tuple[int, int] | None:
        try:
            with torch.device("meta"):
                network = make(name, pretrained=False, num_classes=CLASSES)
        except Exception:  # told when it is built
            return None
        layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
        return _count(network), len(layers)

    return measure


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# ---- building


def build(package: str, name: str) -> tuple[nn.Module, int, int, bool]:
    """A network with its channels, its own input size, and whether it takes that size alone."""
    if package == "timm":
        import timm

        config = timm.get_pretrained_cfg(name) or timm.create_model(name, pretrained=False).pretrained_cfg
        config = config if isinstance(config, dict) else config.to_dict()
        channels, size = config["input_size"][0], config["input_size"][-1]
        fixed = bool(config.get("fixed_input_size"))
        options = {"img_size": 224} if fixed and size > 256 else {}
        network = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return network, channels, options.get("img_size", size), fixed
    if package == "pytorchcv":
        from pytorchcv.model_provider import get_model

        network = get_model(name, pretrained=False, num_classes=CLASSES)
        return network, getattr(network, "in_channels", 3), max(getattr(network, "in_size", (224,))), False
    if package == "transformers":
        from transformers import CONFIG_MAPPING, AutoModelForImageClassification

        if name == "timm_wrapper":
            config = CONFIG_MAPPING[name](architecture="resnet18", num_labels=CLASSES)
        else:
            config = CONFIG_MAPPING[name](num_labels=CLASSES)
        config.architectures = config.architectures or []  # looked through where a configuration has several classes
        own = getattr(config, "vision_config", config)
        size, channels = getattr(own, "image_size", 224), getattr(own, "num_channels", 3)
        size = size if isinstance(size, int) else max(size)
        with torch.device("meta"):
            _refuse_large(AutoModelForImageClassification.from_config(config))
        network = AutoModelForImageClassification.from_config(config)
        return network, channels, size, False
    raise ValueError(package)


def _refuse_large(network: nn.Module) -> None:
    if _count(network) > MOST_PARAMETERS:
        raise NotBuiltError(f"too large for this benchmark: {_count(network) / 1e6:.0f} million parameters")


def make_ready(package: str, name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and images float32 (CLEAN_IMAGES, C, H, W) that it answers.

    Raises:
        NotBuiltError: its package makes no classifier of images of it.
    """
    torch.manual_seed(0)
    try:
        network, channels, size, fixed = build(package, name)
    except NotBuiltError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line), "-")
        raise NotBuiltError(f"its package does not build it: {type(error).__name__}: {reason}") from error
    _refuse_large(network)
    network.eval()
    draw_weights(network)
    images = find_images(network, channels, size, fixed)
    calibrate(network, images)
    return network, images


def draw_weights(network: nn.Module, seed: int = 0) -> None:
    """Give parameters values that show: as they are made, many start as constants, or so small that signals vanish.

    Constants are drawn, about 1 where they were positive, about 0 otherwise; small weights are scaled to variance 1 / inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            first = parameter.flatten()[0].clone()
            if (parameter == first).all():
                about = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.copy_(1 + about if first > 0 else about / 25)
            elif parameter.ndim > 1:
                gain = float(parameter.std()) * (parameter.numel() / len(parameter)) ** 0.5
                if 0 < gain < 1:
                    parameter.div_(gain)


def calibrate(network: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Running statistics of what really comes in, a little off: without, signals of a deep network vanish or explode."""
    generator = torch.Generator().manual_seed(seed)
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.running_var, Tensor)
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        with torch.no_grad():
            network(images.clone())
    except ValueError:  # one value a channel has no variance: those keep what they have
        pass
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        assert norm.running_mean is not None
        assert norm.running_var is not None
        noise = torch.rand(2, len(norm.running_var), generator=generator) - 0.5
        # A channel that hardly moved on these images would explode on others.
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()) + 1e-8).mul_(1.1 + noise[0] / 5)
        norm.running_mean.add_(noise[1] * norm.running_var.sqrt() / 5)


def logits_of(answer: Any) -> Tensor | None:
    """The logits in what a network answers, None where there are none: no classifier of images."""
    logits = getattr(answer, "logits", answer)
    if isinstance(logits, dict):
        logits = next(iter(logits.values()), None)
    if isinstance(logits, tuple | list):
        logits = logits[0] if logits else None
    good = isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1 and logits.is_floating_point()
    return logits if good else None


def find_images(network: nn.Module, channels: int, own: int, fixed: bool) -> Tensor:
    """Images of the first size that the network answers."""
    sizes = [own] if fixed or own <= SIZES[0] else [*(size for size in SIZES if size < own), own]
    reason = ""
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        # Each of a colour of its own: noise alone looks the same to a network.
        images = torch.rand(CLEAN_IMAGES, channels, 1, 1, generator=generator).expand(-1, -1, size, size)
        images = (images + torch.rand(CLEAN_IMAGES, channels, size, size, generator=generator)) / 2
        try:
            with torch.no_grad():
                answer = copy.deepcopy(network)(images[:IMAGES].clone())  # some keep what they saw of a size
        except Exception as error:  # other people's code
            reason = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            continue
        logits = logits_of(answer)
        if logits is None or len(logits) != IMAGES:
            raise NotBuiltError("no classifier of images: it does not answer with logits (n, classes)")
        return images
    raise NotBuiltError(f"no classifier of images: it takes none of size {sizes[-1]} ({reason})")


def prepare_imports(package: str) -> None:
    """Put names of torchvision where they are needed: this process alone."""
    if package == "transformers":
        # It decides once whether torchvision is there, and has to find that it is not.
        from transformers.utils.import_utils import is_torchvision_available

        is_torchvision_available()
    sys.path.append(STUBS)


if __name__ == "__main__":
    prepare_imports("transformers")
    print(json.dumps(draw()))
