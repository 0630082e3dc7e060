"""Networks made as large as a file says, and never larger than what the file holds."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import get_ident
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import WeightsError

#: Modules of any network, and those for each tensor beside them: many layers have no tensor.
FEW_MODULES, MODULES_PER_TENSOR = 1000, 20
#: Calls in the making of any network, and those for each tensor beside them: some loop over all pairs of places in an image.
FEW_CALLS, CALLS_PER_TENSOR = 3_000_000, 4000
#: Numbers that one operation on two images may give, and all of them: attention over all pairs of places may be asked for by a
#: small file.
MOST_NUMBERS, MOST_IN_ALL = 1 << 28, 1 << 32
Network = TypeVar("Network", bound=nn.Module)


def within(make: Callable[[], Network], weights: Mapping[str, Tensor]) -> Network:
    """The network that ``make`` returns, on the meta device, where nothing is allocated; see ``counted``."""
    with counted(weights), torch.device("meta"):
        return make()


def check_pass(planned: nn.Module, shape: Sequence[int]) -> None:
    """Let two images of a shape (C, H, W) through a network on the meta device, where nothing is computed.

    Errors are left to the first true pass, which says more of them.

    Raises:
        WeightsError: an operation would give more than ``MOST_NUMBERS``.
    """
    with torch.no_grad(), suppress(Exception), _Measuring() as measuring:
        planned.eval()(torch.empty(2, *shape, device="meta"))
    if measuring.most > MOST_NUMBERS or measuring.all > MOST_IN_ALL:
        raise WeightsError(
            f"a pass of two images of shape {tuple(shape)} through the network that is described would take {measuring.most:,} "
            f"numbers at once, and {measuring.all:,} in all; {MOST_NUMBERS:,} and {MOST_IN_ALL:,} are the most "
            "(InfectedModel.from_module takes any network of your own code)"
        )


class _Measuring(TorchDispatchMode):
    """Notes how many numbers an operation gives at most, and all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if not any(result.alias_info for result in func._schema.returns):  # a view takes no memory
            numbers = [part.numel() for part in tree_leaves(given) if isinstance(part, Tensor)]
            self.most, self.all = max([self.most, *numbers]), self.all + sum(numbers)
        return given


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
        sys.setprofile(_but_imports(work))  # of this thread alone
        hooks.callback(register_module_parameter_registration_hook(counter("parameters", few)).remove)
        hooks.callback(register_module_module_registration_hook(counter("layers", many)).remove)
        yield


def _but_imports(work: Callable[..., None]) -> Callable[[FrameType, str, Any], None]:
    """Calls ``work`` where a function begins or ends, but for what libraries do when something of them is first imported."""
    importing = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal importing
        if event in ("call", "return") and frame.f_code.co_name == "_find_and_load":
            importing += 1 if event == "call" else -1
        elif not importing:
            work()

    return count
