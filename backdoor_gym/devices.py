"""Where networks run."""

import os

import torch

from .errors import DataError
from .wording import cut, first_line, shown

# A forked process (AsyncVectorEnv) inherits the state of torch's threads, but not the threads, and would wait for them
# forever; with one thread it asks for none.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        DataError: no such device, or it is not usable on this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"the device {shown(str(name))} cannot be used here ({cut(first_line(error), 200)})") from error
    return device
