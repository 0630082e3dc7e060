"""Stands in for torchvision where timm and pytorchcv ask for its names as they are imported.

Only ``compatibility.py`` puts this folder on the path, for its own processes: networks are built with random weights and
given tensors, so that nothing of torchvision is ever used. Whatever is used all the same raises.
"""

from typing import Any


class Unused:
    """A name that may be imported and not used."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} of torchvision is needed, but only its name is here")
