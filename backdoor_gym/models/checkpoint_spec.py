"""What other people's weights do not say themselves: their network, the clean images, what is done to images before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..arguments import check_callable, check_kind, check_options
from ..data.datasets import LabelledImages
from ..data.own_images import Source, all_images, own_images
from ..errors import DataError

Factory = str | nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class CheckpointSpec:
    """How anybody's weights become an infected model; None for what is not said.

    Args:
        architecture: name of an architecture of this package; its number of classes is that of the weights.
        options: of the architecture, such as ``{"width": 16}``, or of ``timm.create_model``.
        module: your own network: a module, a function or class that makes one, or ``"package.module:factory"``, which imports
            and runs that code of yours.
        clean: the defender's images, in any form that ``own_images`` takes: neither training images of the network nor test
            images.
        test: images to score on; by default the rest of a named data set, and none otherwise.
        clean_images: how many of ``clean`` are drawn; by default 500 of a named data set, and all otherwise.
        image_size: height and width that images of folders and named data sets are resized to.
        preprocess: from images in [0, 1] to what the network takes (see ``InfectedModel.from_module``).
        timm: the name of a network of timm.

    Raises:
        DataError: an argument of a wrong type.
    """

    architecture: str | None = None
    options: Mapping[str, Any] | None = None
    module: Factory | None = None
    clean: Source | None = None
    test: Source | None = None
    clean_images: int | None = None
    image_size: tuple[int, int] | None = None
    preprocess: Callable[[Tensor], Tensor] | None = None
    timm: str | None = None

    def __post_init__(self) -> None:
        check_kind("architecture", self.architecture, str, "a name", may_be_none=True)
        check_options("options", self.options)
        check_callable("preprocess", self.preprocess, may_be_none=True)
        check_kind("timm", self.timm, str, "a name", may_be_none=True)

    @property
    def said(self) -> list[str]:
        """Names of the arguments that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if value is not None and (name != "options" or value)]

    def check_clean(self, where: str | Path, hint: str = "") -> None:
        """Raise ``DataError`` where no clean images are named for what is read from there; ``hint`` ends the message."""
        if self.clean is None:
            raise DataError(
                f"{where} brings no images: name clean ones with --clean (clean=), the .npz, the folder or the data set that they "
                f"are in{hint}"
            )

    def read_images(self, size: tuple[int, int] | None) -> tuple[LabelledImages, LabelledImages | None]:
        """The clean images, and those to score on; those of folders and named data sets are resized to height and width.

        Raises:
            DataError: they cannot be read.
        """
        assert self.clean is not None
        given = own_images(self.clean, self.clean_images, size)
        return given.images, given.rest if self.test is None else all_images(self.test, size)
