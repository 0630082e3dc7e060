"""An infected model: a network, the defender's clean images, and, for scoring only, test images, trigger and target."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor, nn

from .arguments import check_path
from .errors import BackdoorGymError, DataError, ModelFileError, WeightsError
from .metrics import Metrics, evaluate
from .wording import one_line
from .writing import as_json, finite
from .zoo.adapting import LOGITS, in_float32, unwrapped
from .zoo.architectures import build_from_spec
from .zoo.attacks import Attack, attack_from_state
from .zoo.datasets import DIGITS, DataSource, LabelledImages, check_labels, fingerprint, named_in_file
from .zoo.files import read_tensors, write_tensors
from .zoo.own_images import Source, all_images, fit_channels, own_images
from .zoo.preprocessing import Normalise, Preprocessed, giving_logits, own_module
from .zoo.schemas import MOST_NAME, ImagesFields, ModelFields, checked
from .zoo.sizes import within
from .zoo.targets import Target, check_target

FORMAT = "backdoor-gym-infected/1"
#: Tensors of a file beside those of the network and of the trigger.
IMAGES = frozenset(f"{role}.{what}" for role in ("clean", "test") for what in ("images", "labels", "indices"))


@dataclass
class InfectedModel:
    """A network that may carry a backdoor, with what a defender has and what a referee knows.

    Args:
        network: module from float32 images (n, C, H, W) in [0, 1] to logits (n, classes).
        clean: the defender's clean images: neither training images of the network nor the test images.
        test: images the repaired network is scored on; policies never see them.
        trigger: stamps the trigger on images; policies never see it.
        target: the attacker's label, or "all-to-all" (``zoo/targets.py``).
        architecture: ``{"name": ..., "num_classes": ..., "in_channels": ..., ...}``; needed for ``save``.
        facts: what is known of its making (attack, poison rate, ACC and ASR when made, ...), JSON-able.
        name: what to call it.
        checkpoint: the file that the weights came from, where it was not this package that wrote it.
        layout: the form that it came in, where a repaired network goes back into that (see ``zoo.pretrained.Layout``): ``save``
            takes a folder and the repaired ``module`` and gives the files that it wrote, the weights first.
        dtypes: of weights of the module that are not float32; ``network`` is a copy in float32 then.

    Raises:
        WeightsError: a weight that is not finite.
        DataError: clean images that the network cannot take, labels outside its classes, or a target outside them.
    """

    network: nn.Module
    clean: LabelledImages
    test: LabelledImages | None = None
    trigger: Attack | Callable[[Tensor], Tensor] | None = None
    target: Target | None = None
    architecture: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    name: str = "unnamed"
    checkpoint: str | None = None
    layout: Any = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._adapt()
        check_finite(self.network)
        given, self.clean = self.clean, fit_channels(self.network, self.clean)
        if self.clean is not given:
            counts = given.images.shape[1], self.clean.images.shape[1]
            self.facts = {**self.facts, "channels": f"images of {counts[0]} equal channels were taken as {counts[1]}"}
        self._check_classes(self.clean)
        check_labels(self.clean.labels, self.num_classes)
        if self.test is not None:
            colour = self.clean.images.shape[1] == 3
            if self.test.loaded or (colour and self.test.source is not None and self.test.source.dataset == DIGITS):
                self.test = fit_channels(self.network, self.test)
            self._check_test(self.test)
        if self.target is not None:
            check_target(self.target, self.num_classes)
        if self.trigger is not None:
            check_trigger(self.trigger, self.clean.images[:1])

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        clean: Source,
        test: Source | None = None,
        trigger: Attack | Callable[[Tensor], Tensor] | None = None,
        target: Target | None = None,
        name: str = "unnamed",
        preprocess: Callable[[Tensor], Tensor] | None = None,
    ) -> Self:
        """An infected model of your own.

        This package holds images as float32 (n, C, H, W) in [0, 1], RGB where C is 3. A network that was trained on others
        (normalised, scaled to [-1, 1] or 255, BGR, ...) needs ``preprocess``, or a layer of its own that does it.

        Args:
            module: from images, or what ``preprocess`` makes of them, to logits (n, classes), or to an answer that holds them: as
                ``logits``, or as its first tensor of that form. ``DataParallel``, ``torch.compile`` and the like are taken off. It
                is put into eval mode, and not copied, unless weights are of another type than float32; then a copy in float32 is
                computed with.
            clean: the defender's images: a pair (images float32 (n, C, H, W) in [0, 1], labels int64 (n,)), a ``Dataset`` or
                ``DataLoader`` of these, or a file, a folder or the name of a data set (see ``zoo.own_images.own_images``). Grey
                images for a network of colours get three equal channels, and the other way round.
            test: images to score on, in the same forms; by default none, or the rest where ``clean`` names a data set.
            trigger: stamps the trigger on images (n, C, H, W) in [0, 1] and gives such images; for scoring alone.
            target: the attacker's label, or "all-to-all".
            name: what to call it.
            preprocess: callable or module that stands in front, from float32 (n, C, H, W) in [0, 1] to what ``module`` takes,
                as many images in the same order, the same each time; such as ``Normalise(mean, std)``.

        Raises:
            WeightsError, DataError: as the class does, and where ``preprocess`` does not give tensors of as many images.
        """
        given = own_images(clean)
        scoring = given.rest if test is None else all_images(test)
        if preprocess is not None:
            check_preprocess(preprocess, given.images.images[:2])
            module = Preprocessed(preprocess, module)
        return cls(module, given.images, scoring, trigger, target, name=name)

    def _adapt(self) -> None:
        """Take the network out of its wrappers, and compute in float32; ``num_classes`` finds the logits in its answer."""
        given = own_module(self.network)
        if not isinstance(given, nn.Module):
            what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise DataError(
                f"the network must be a torch.nn.Module, not {what}; make one of its class, and load_state_dict its weights into it"
            )
        if any(nn.parameter.is_lazy(one) for one in (*self.network.parameters(), *self.network.buffers())):
            raise DataError("the network has lazy layers that were never called; call it once with some images before")
        module, dtypes = in_float32(unwrapped(given).eval())
        self.dtypes = dtypes or self.dtypes
        if not isinstance(self.network, Preprocessed):
            self.network = module
        elif module is not self.network.network:
            self.network = Preprocessed(self.network.preprocess.function, module, self.network.entry)
        self.network.eval()

    @property
    def module(self) -> nn.Module:
        """The network without what stands in front of it: the one that was given to ``from_module``."""
        return own_module(self.network)

    @cached_property
    def num_classes(self) -> int:
        """Number of logits, found by running the network on two clean images: some networks cannot take a single one."""
        images = torch.cat([self.clean.images[:2]] * 2)[:2]
        try:
            with torch.no_grad():
                device = next((parameter.device for parameter in self.network.parameters()), "cpu")
                self.network = giving_logits(self.network, images.to(device), int(self.clean.labels.max()) + 1)
                logits = self.network(images.clone().to(device))
        except BackdoorGymError:
            raise
        except Exception as error:  # the user's code, which can raise anything
            shape = tuple(self.clean.images.shape[1:])
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"the network cannot take images of shape {shape}: {reason}; give it images as it was trained with (--image-size "
                "resizes those of folders and named data sets)"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DataError(f"the network must give logits (n, classes), not {what}")
        if not torch.isfinite(logits).all():
            raise WeightsError(
                "the network answers clean images with logits that are not finite: its weights are damaged"
            )
        entry = getattr(self.network, "entry", None)
        if entry not in (None, LOGITS[0]) and "logits" not in self.facts:
            self.facts = {**self.facts, "logits": f"entry {entry!r} of the network's answer"}
            warnings.warn(f"The logits are taken from entry {entry!r} of the network's answer.", stacklevel=7)
        return logits.shape[1]

    def _check_test(self, test: LabelledImages) -> None:
        """Test images must fit the network as the clean ones do, and be others than those."""
        ours, theirs = self.clean.source, test.source
        if ours is not None and theirs is not None:
            same = (ours.dataset, ours.split) == (theirs.dataset, theirs.split)
            if same and set(ours.indices) & set(theirs.indices):
                raise DataError("some of the test images are the defender's clean images")
        self._check_classes(test)
        if test.loaded:
            self._check_fit(test)

    def _check_fit(self, test: LabelledImages) -> None:
        if test.images.shape[1:] != self.clean.images.shape[1:]:
            raise DataError(
                f"test images of shape {tuple(test.images.shape[1:])} do not fit clean images of shape "
                f"{tuple(self.clean.images.shape[1:])}"
            )
        check_labels(test.labels, self.num_classes)

    def _check_classes(self, images: LabelledImages) -> None:
        if images.classes not in (None, self.num_classes):
            raise DataError(
                f"the {'clean' if images is self.clean else 'test'} images have {images.classes} classes and the network "
                f"{self.num_classes}, so that labels may mean other classes; an empty folder stands for a class without images"
            )

    def evaluate(self, network: nn.Module | None = None, on_batch: Callable[[int, int], None] | None = None) -> Metrics:
        """ACC, ASR and RA of a network (by default this one) on the test images; None for what is not known.

        ``on_batch`` is told how many answers it has given, and of how many.
        """
        if self.test is None:
            return Metrics(None)
        self._check_fit(self.test)
        return evaluate(
            network or self.network, self.test.images, self.test.labels, self.trigger, self.target, on_batch
        )

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write one safetensors file; images are held in it only where they belong to no named data set.

        Args:
            path: the file.
            half: whether to store the weights as float16, for half the size; ``infect(half=True)`` has rounded them
                before it measured the network.

        Raises:
            ModelFileError: the architecture is not known by name, or what stands in front of it is not, so nobody could load
                the file.
            OSError: the file cannot be written.
        """
        check_path("the file", path)
        if self.architecture is None:
            raise ModelFileError(
                "only a model whose architecture is known by name can be saved as an infected model; "
                "set .architecture, or save the state dict alone with safetensors"
            )
        weights = self.module.state_dict()
        if half:
            weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        tensors = {f"network.{key}": value for key, value in weights.items()}
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "name": one_line(self.name, MOST_NAME - 3),
            "architecture": self.architecture,
            "target": self.target,
            "facts": finite(self.facts),
            "data": {},
        }
        if isinstance(self.network, Preprocessed):
            in_front = self.network.preprocess.function
            if not isinstance(in_front, Normalise):
                raise ModelFileError("a preprocess other than Normalise(mean, std) cannot be saved with the model")
            metadata["normalise"] = in_front.state()
        for role, images in (("clean", self.clean), ("test", self.test)):
            if images is not None:
                metadata["data"][role] = _pack_images(images, role, tensors)
        if self.trigger is not None:
            if not isinstance(self.trigger, Attack):
                raise ModelFileError(
                    "a trigger of your own cannot be saved with the model; only attacks of this package can"
                )
            parameters, trigger_tensors = self.trigger.state()
            metadata["trigger"] = {"attack": self.trigger.name, "parameters": parameters}
            tensors |= {f"trigger.{key}": value for key, value in trigger_tensors.items()}
        checked(msgspec.json.decode(as_json(metadata)), ModelFields, "the model")  # it is to be read again
        write_tensors(Path(path), tensors, metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, data: str | None = None) -> Self:
        """Read a file that ``save`` wrote; no code of the file is ever run.

        Args:
            path: the file.
            data: data set (Hub id or folder) to read the images from, instead of the one the file names.

        Raises:
            ModelFileError: missing, damaged, a pickle, or not an infected model.
            WeightsError: weights that do not fit the architecture, or that are not finite.
            DataError: the data set is not there, or does not fit the network.
        """
        path = Path(path)
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ModelFileError(f"{path} holds {metadata.get('format')!r}, not an infected model ({FORMAT})")
        fields = checked(metadata, ModelFields, str(path))
        try:
            strange = [name for name in tensors if not name.startswith(("network.", "trigger.")) and name not in IMAGES]
            if strange:
                raise ModelFileError(f"{path} holds {strange[0]}, which no infected model has")
            weights = _part(tensors, "network.")
            # A file says how large the network is: nothing is allocated before its weights fit.
            check_shapes(within(lambda: build_from_spec(fields.architecture), weights), weights)
            network = build_from_spec(fields.architecture)
            load_weights(network, weights)
            if fields.normalise is not UNSET:
                network = Preprocessed(Normalise(fields.normalise.mean, fields.normalise.std), network)
            clean = _unpack_images(fields.data.clean, "clean", tensors, data)
            test = None
            if fields.data.test is not UNSET:
                test = _unpack_images(fields.data.test, "test", tensors, data)
            trigger = None
            if fields.trigger is not UNSET:
                own = _part(tensors, "trigger.")
                trigger = attack_from_state(fields.trigger.attack, fields.trigger.parameters, own)
            return cls(
                network,
                clean,
                test,
                trigger,
                fields.target,
                fields.architecture,
                fields.facts,
                fields.name.strip() or "unnamed",
            )
        except BackdoorGymError:
            raise
        except Exception as error:  # whatever a file says, reading it must end in one clear line
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelFileError(f"{path} does not describe an infected model completely ({reason})") from error


def check_finite(network: nn.Module) -> None:
    """Raise ``WeightsError`` where a weight or a statistic is NaN or infinite, or a variance is below zero.

    A mask that is a buffer may be infinite.
    """
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if not value.is_floating_point():
            continue
        is_mask = not isinstance(value, nn.Parameter) and not name.rpartition(".")[2].startswith("running_")
        if torch.isnan(value).any() or not (is_mask or torch.isfinite(value).all()):
            raise WeightsError(f"the weights hold values that are not finite (first in {name})")
        if name.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
            raise WeightsError(f"{name} holds variances below zero: it is damaged, or was never trained")


def check_trigger(trigger: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Raise ``DataError`` unless the trigger turns these images into finite ones of the same shape in [0, 1]."""
    try:
        triggered = trigger(images.clone())
    except Exception as error:  # parameters of a file or of a user, in any combination
        raise DataError(f"the trigger cannot be stamped on images of {tuple(images.shape[1:])}: {error}") from error
    if (
        not isinstance(triggered, Tensor)
        or triggered.shape != images.shape
        or not bool(((triggered >= 0) & (triggered <= 1)).all())
    ):
        raise DataError(f"the trigger must give images of shape {tuple(images.shape[1:])} with values in [0, 1]")


def refuse_module(thing: Any) -> None:
    """Raise ``DataError`` for a network where a model, which has clean images beside it, is asked for."""
    if isinstance(thing, nn.Module):
        raise DataError(
            f"a {type(thing).__name__} alone has no clean images: make a model of both, with "
            "InfectedModel.from_module(network, clean=(images, labels))"
        )


def check_preprocess(preprocess: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Raise ``DataError`` unless it makes finite floats of these images, as many as there are, the same each time."""
    try:
        with torch.no_grad():
            first, second = preprocess(images.clone()), preprocess(images.clone())
    except Exception as error:  # the user's code, which can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"preprocess cannot take images of shape {tuple(images.shape)}: {reason}") from error
    if not isinstance(first, Tensor) or first.shape[:1] != images.shape[:1] or not first.is_floating_point():
        what = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise DataError(f"preprocess must make floats (n, ...) of float32 images (n, C, H, W), not {what}")
    if not torch.isfinite(first).all() or not torch.equal(first, second):
        raise DataError("preprocess must give finite values, and the same each time: nothing random belongs there")


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict that fits (``check_shapes``), of the same kinds of numbers."""
    check_shapes(network, weights)
    for key, value in network.state_dict().items():
        if _kind(value) != _kind(weights[key]):
            raise WeightsError(f"the weights of {key} must be like {value.dtype}, not {weights[key].dtype}")
    network.load_state_dict(weights)


def _kind(tensor: Tensor) -> str:
    """What kind of numbers it holds."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def check_shapes(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ``WeightsError`` with one line that says in what a state dict differs from that of the network."""
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in wanted]
    differing = [
        f"{key}: {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = [
        f"{len(found)} {kind} ({', '.join(found[:2])}{', ...' if len(found) > 2 else ''})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if found
    ]
    if problems:
        raise WeightsError(f"the weights are not of a {type(network).__name__} like this: {'; '.join(problems)}")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _pack_images(images: LabelledImages, role: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    if images.source is None:
        tensors[f"{role}.images"], tensors[f"{role}.labels"] = images.images, images.labels
        return {}
    source = images.source
    tensors[f"{role}.indices"] = torch.tensor(source.indices, dtype=torch.int64)
    digest = source.fingerprint or fingerprint(source.dataset, source.split)
    return {"dataset": source.dataset, "split": source.split, "fingerprint": digest}


def _unpack_images(fields: ImagesFields, role: str, tensors: Mapping[str, Tensor], data: str | None) -> LabelledImages:
    if fields.dataset is UNSET or fields.split is UNSET:
        if data is not None:
            raise DataError(
                f"the model holds its {role} images itself, and names no data set that another could stand for: leave --data "
                "(data=) out"
            )
        return LabelledImages(tensors[f"{role}.images"], tensors[f"{role}.labels"])
    dataset, split = data or named_in_file(fields.dataset), fields.split
    digest = fingerprint(dataset, split)
    if digest != fields.fingerprint:
        raise DataError(
            f"the split {split} of {dataset} is not the one that the model names (other labels or another order); "
            "its clean images might be training images"
        )
    stored = tensors[f"{role}.indices"]
    if stored.dtype != torch.int64 or stored.ndim != 1:
        raise ModelFileError(f"{role}.indices must be int64 (n,), not {stored.dtype} {tuple(stored.shape)}")
    if len(torch.unique(stored)) < len(stored):
        raise ModelFileError(f"{role}.indices name some images several times")
    indices = tuple(stored.tolist())
    return LabelledImages.from_source(DataSource(dataset, split, indices, digest))
