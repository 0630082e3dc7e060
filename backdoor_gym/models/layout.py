"""The form that a network of transformers or timm came in, for writing a repaired one in the same."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..writing import beside

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Layout:
    """A folder of JSON files and ``model.safetensors``.

    Args:
        texts: the JSON files beside the weights, by name.
        dtypes: of each tensor in the files of weights.
        kept: tensors there that the network may have no place for, such as the indices that older releases stored.
        prefix: what stands before the network's own names there; transformers puts its own in front.
    """

    texts: Mapping[str, bytes]
    dtypes: Mapping[str, torch.dtype] = field(repr=False)
    kept: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    prefix: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that ``save`` writes, the weights first."""
        return (WEIGHTS, *self.texts)

    def save(self, folder: str | Path, network: nn.Module) -> list[Path]:
        """Write ``model.safetensors``, with the names and dtypes it came with, and copies of the JSON files.

        Raises:
            WriteError: the folder cannot be written.
        """
        folder = Path(folder)
        with beside(folder) as new:
            tensors = {
                name: value.detach().cpu().to(self.dtypes.get(name, value.dtype)).contiguous()
                for name, value in {**self.kept, **self._named(new, network)}.items()
            }
            save_file(tensors, new / WEIGHTS, {"format": "pt"})
            for name, text in self.texts.items():
                (new / name).write_bytes(text)
        return [folder / name for name in self.files]

    def _named(self, folder: Path, network: Any) -> Mapping[str, Tensor]:
        if not hasattr(network, "save_pretrained"):
            return {f"{self.prefix}{name}": value.clone() for name, value in network.state_dict().items()}
        # Its own modules have other names than its files, from release to release.
        with quiet_transformers(), TemporaryDirectory(dir=folder) as spare:
            network.save_pretrained(spare, max_shard_size="1000GB")
            return load_file(Path(spare) / WEIGHTS)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While it lasts, transformers says nothing of its own."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
