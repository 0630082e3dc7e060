"""Networks made as large as a file says, and never larger than what the file holds."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import WeightsError

#: Modules of any network, and those for each tensor beside them: many layers have no tensor.
FEW_MODULES, MODULES_PER_TENSOR = 1000, 20
#: Calls in the making of any network, and those for each tensor beside them: some loop over all pairs of places in an image.
FEW_CALLS, CALLS_PER_TENSOR = 3_000_000, 4000
Network = TypeVar("Network", bound=nn.Module)


def within(make: Callable[[], Network], weights: Mapping[str, Tensor]) -> Network:
    """The network that ``make`` returns, on the meta device, where nothing is allocated; see ``counted``."""
    with counted(weights), torch.device("meta"):
        return make()


@contextmanager
def counted(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A block that ends when a network made in it has far more parameters or layers, or takes more work, than its weights say.

    Raises:
        WeightsError: it has.
    """
    thread = get_ident()  # PyTorch calls the hooks for modules of all threads

    def counter(what: str, most: int) -> Callable[..., None]:
        made = 0

        def count(*_: object) -> None:
            nonlocal made
            made += get_ident() == thread
            if made > most:
                raise WeightsError(
                    f"the network that is described has more {what} than the file, of {len(weights)} tensors"
                )

        return count

    few = 2 * len(weights) + FEW_MODULES  # of parameters, some are made, and then replaced or taken away
    many = MODULES_PER_TENSOR * len(weights) + FEW_MODULES
    with ExitStack() as hooks:
        work = counter("steps of its making", FEW_CALLS + CALLS_PER_TENSOR * len(weights))
        hooks.callback(sys.setprofile, sys.getprofile())
        sys.setprofile(work)  # of this thread alone; called where a function begins or ends
        hooks.callback(register_module_parameter_registration_hook(counter("parameters", few)).remove)
        hooks.callback(register_module_module_registration_hook(counter("layers", many)).remove)
        yield
