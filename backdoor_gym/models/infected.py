"""An infected model: a network, the defender's clean images, and, for scoring only, test images, trigger and target."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..arguments import check_path
from ..attacks import Attack
from ..attacks.attack import check_change
from ..attacks.targets import Target, check_target
from ..data.channels import fit_channels
from ..data.datasets import DIGITS, LabelledImages, check_labels
from ..data.own_images import Source, all_images, own_images
from ..errors import BackdoorGymError, DataError, WeightsError
from ..metrics import Metrics, evaluate
from ..networks.adapting import LOGITS, in_float32, in_own_types, unwrapped
from ..networks.preprocessing import Preprocessed, check_preprocess, giving_logits, own_module
from ..networks.weights import check_finite
from ..wording import first_line
from .infected_files import read_infected, write_infected


@dataclass
class InfectedModel:
    """A network that may carry a backdoor, with what a defender has and what a referee knows.

    Args:
        network: module from float32 images (n, C, H, W) in [0, 1] to logits (n, classes).
        clean: the defender's clean images: neither training images of the network nor the test images.
        test: images the repaired network is scored on; policies never see them.
        trigger: stamps the trigger on images; policies never see it.
        target: the attacker's label, or "all-to-all" (``attacks/targets.py``).
        architecture: ``{"name": ..., "num_classes": ..., "in_channels": ..., ...}``; needed for ``save``.
        facts: what is known of its making (attack, poison rate, ACC and ASR when made, ...), JSON-able.
        name: what to call it.
        checkpoint: the file that the weights came from, where it was not this package that wrote it.
        layout: the form that it came in, where a repaired network goes back into that (``models.layout.Layout``).
        dtypes: of weights of the module that are not float32; ``network`` is a copy in float32 then.

    Raises:
        WeightsError: a weight that is not finite.
        DataError: clean images that the network cannot take, labels outside its classes, or a target outside them.

    Examples:
        >>> from backdoor_gym import load_infected
        >>> model = load_infected("digits-badnets")
        >>> model.num_classes, model.target
        (10, 3)
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

        Images are float32 (n, C, H, W) in [0, 1], RGB where C is 3. A network that was trained on others (normalised, scaled to
        [-1, 1] or 255, BGR, ...) needs ``preprocess``, or a layer of its own that does it.

        Args:
            module: from images, or what ``preprocess`` makes of them, to logits (n, classes), or to an answer that holds them
                (``networks.adapting.find_logits``). ``DataParallel``, ``torch.compile`` and the like are taken off. It is put
                into eval mode, and not copied, unless weights are of another type than float32; then a copy in float32 is
                computed with.
            clean: the defender's images, in any form that ``data.own_images.own_images`` takes. Grey images for a network of
                colours get three equal channels, and the other way round.
            test: images to score on, in the same forms; by default none, or the rest where ``clean`` names a data set.
            trigger: stamps the trigger on images, for scoring alone.
            target: the attacker's label, or "all-to-all".
            name: what to call it.
            preprocess: stands in front: makes of images what ``module`` takes, as many, the same each time (``Normalise``).

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
        if any(nn.parameter.is_lazy(value) for value in (*self.network.parameters(), *self.network.buffers())):
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
            if self.dtypes:  # its forward may cast to these types itself
                given = self.network, self.dtypes
                self.network, self.dtypes = in_own_types(*given), {}
                with suppress(DataError):
                    return self.num_classes
                self.network, self.dtypes = given
            raise DataError(
                f"the network cannot take images of shape {tuple(images.shape[1:])}: {first_line(error)}; give it images as it was "
                "trained with (--image-size resizes those of folders and named data sets)"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DataError(f"the network must give logits (n, classes), not {what}")
        if not logits.is_floating_point() or logits.layout != torch.strided:
            raise DataError(
                f"the network must give logits as plain floating-point numbers, not {logits.dtype}, {logits.layout}"
            )
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
        network = network or self.network
        return evaluate(network, self.test.images, self.test.labels, self.trigger, self.target, on_batch)

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write one safetensors file; images are held in it only where they belong to no named data set.

        Args:
            path: the file.
            half: whether to store the weights as float16, as ``infect(half=True)`` rounds them.

        Raises:
            ModelFileError: nobody could load it: the architecture has no name, or an unknown function stands in front of it.
            WriteError: the file cannot be written.
        """
        check_path("the file", path)
        write_infected(Path(path), self, half)
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
        return read_infected(Path(path), data, cls)


def refuse_module(thing: Any) -> None:
    """Raise ``DataError`` for a network where a model, which has clean images beside it, is asked for."""
    if isinstance(thing, nn.Module):
        raise DataError(
            f"a {type(thing).__name__} alone has no clean images: make a model of both, with "
            "InfectedModel.from_module(network, clean=(images, labels))"
        )


def check_trigger(trigger: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Raise ``DataError`` unless the trigger turns these images into finite ones of the same shape in [0, 1]."""
    try:
        triggered = trigger(images.clone())
    except Exception as error:  # parameters of a file or of a user, in any combination
        raise DataError(f"the trigger cannot be stamped on images of {tuple(images.shape[1:])}: {error}") from error
    alike = isinstance(triggered, Tensor) and triggered.shape == images.shape
    if not alike or not bool(((triggered >= 0) & (triggered <= 1)).all()):
        raise DataError(f"the trigger must give images of shape {tuple(images.shape[1:])} with values in [0, 1]")
    if isinstance(trigger, Attack):
        channels, height, width = images.shape[1:]
        check_change(trigger, (channels, height, width))
