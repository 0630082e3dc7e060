"""Where networks run."""

import torch

from .errors import DataError


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        DataError: no such device, or it is not usable on this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise DataError(f"the device {str(name)!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device
