"""Networks made as large as a file says, and never larger than what the file holds."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import WeightsError

#: Modules that a network may have, and those for each tensor beside them: many layers have no tensor.
FEW_MODULES, MODULES_PER_TENSOR = 1000, 20
Network = TypeVar("Network", bound=nn.Module)


def within(make: Callable[[], Network], weights: Mapping[str, Tensor]) -> Network:
    """A network on the meta device, where nothing is allocated, of no more parameters than there are weights.

    Args:
        make: makes it.
        weights: of the file that says how large it is.

    Raises:
        WeightsError: it would have more parameters or layers than the file has tensors for.
    """
    with counted(weights), torch.device("meta"):
        return make()


@contextmanager
def counted(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Making a module in this block ends as soon as it asks for far more parameters or layers than there are weights.

    Raises:
        WeightsError: it does.
    """
    tensors = len(weights)
    parameters = modules = 0
    thread = get_ident()  # PyTorch tells of what is made in all of them

    def count_parameter(*_: object) -> None:
        nonlocal parameters
        parameters += get_ident() == thread
        # Some are made, and then replaced or taken away.
        if parameters > 2 * tensors + FEW_MODULES:
            raise WeightsError(f"the network that is described has more parameters than the file, of {tensors} tensors")

    def count_module(*_: object) -> None:
        nonlocal modules
        modules += get_ident() == thread
        if modules > MODULES_PER_TENSOR * tensors + FEW_MODULES:
            raise WeightsError(f"the network that is described has more layers than the file, of {tensors} tensors")

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
