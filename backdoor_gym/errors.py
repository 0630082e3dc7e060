"""Errors that a user can cause, one class a kind; each message says what was wrong and what is allowed."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from .wording import MOST_SHOWN, cut, one_line, shown

#: Names among which the nearest are sought, and names that are listed: seeking takes time.
MOST_COMPARED, MOST_NAMED = 500, 12


class BackdoorGymError(Exception):
    """Base of every error that this package raises on purpose; its text is one printable line of bearable length.

    Examples:
        >>> from backdoor_gym import BackdoorGymError, repair
        >>> try:
        ...     repair("digits-badnets", accuracy_budget=2)
        ... except BackdoorGymError as error:
        ...     print(error)
        accuracy_budget must be a number from 0 to 1 or None, not 2
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ModelFileError(BackdoorGymError, ValueError):
    """A file cannot be read as an infected model: missing, damaged, or of a kind that is never opened.

    Examples:
        >>> from backdoor_gym import load_infected
        >>> load_infected("nowhere.safetensors")
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.ModelFileError: there is no file nowhere.safetensors
    """


class WeightsError(BackdoorGymError, ValueError):
    """Weights do not fit their architecture, or are not finite.

    Examples:
        >>> import torch
        >>> from backdoor_gym.baselines import clp
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
        >>> network[0].weight.data[0] = float("nan")
        >>> clp.prune(network)
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.WeightsError: the weights hold values that are not finite (first in 0.weight)
    """


class DataError(BackdoorGymError, ValueError):
    """An argument, images or labels are of a wrong type, shape or range, or a data set cannot be read.

    Examples:
        >>> from backdoor_gym import repair
        >>> repair("digits-badnets", accuracy_budget=2)
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.DataError: accuracy_budget must be a number from 0 to 1 or None, not 2
    """


class UntraceableError(BackdoorGymError, ValueError):
    """A network's neurons cannot be found; the message names the layer and what to change.

    Examples:
        >>> import torch
        >>> from backdoor_gym.neurons.finding import find_neurons
        >>> find_neurons(torch.nn.Flatten(), torch.rand(1, 3, 8, 8))
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.UntraceableError: Flatten has no prunable neuron: ...
    """


class CompactionError(BackdoorGymError, RuntimeError):
    """Channels cannot be cut out of this network without changing its outputs.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from backdoor_gym.masking.cutting import cut_channels
        >>> from backdoor_gym.neurons.finding import find_neurons
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
        >>> neurons = find_neurons(network, torch.rand(1, 1, 8, 8))
        >>> cut_channels(network, neurons, np.array([True, False]), torch.rand(1, 1, 9, 9))
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.CompactionError: Sequential cannot take these images, to check a cut with: ...
    """


class TrainingError(BackdoorGymError, RuntimeError):
    """An infected model could not be made as asked: too low accuracy or attack success.

    Examples:
        >>> from backdoor_gym import infect
        >>> from backdoor_gym.models.training import Schedule
        >>> infect("digits", "small_cnn", schedule=Schedule(epochs=1, learning_rate=1e9), architecture_options={"width": 8})
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.TrainingError: the loss of epoch 1 is nan; try a lower learning rate
    """


class UnknownNameError(BackdoorGymError, ValueError):
    """A name is not among the allowed ones; the nearest of them are suggested.

    Examples:
        >>> from backdoor_gym import repair
        >>> repair("digits-badnets", "bpn")
        Traceback (most recent call last):
            ...
        backdoor_gym.errors.UnknownNameError: unknown policy 'bpn'; did you mean 'bnp'?; or the path of a policy file, *.safetensors
    """

    def __init__(self, kind: str, name: Any, allowed: Iterable[str], hint: str = "") -> None:
        names = sorted(map(str, allowed))
        listed = [cut(known) for known in names[:MOST_NAMED]] + ["..."] * (len(names) > MOST_NAMED)
        choices = f"known: {', '.join(listed)}"
        what = f"unknown {kind} {shown(name)}"
        if not isinstance(name, str):
            what = f"{what} (a name is a text, and not of the type {type(name).__name__})"
        elif len(name) <= MOST_SHOWN:
            compared = [known for known in names[:MOST_COMPARED] if len(known) <= MOST_SHOWN]
            if near := get_close_matches(name, compared, n=3, cutoff=0.5):
                choices = f"did you mean {' or '.join(map(repr, near))}?"
        super().__init__("; ".join(part for part in (what, choices, hint) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args)  # another process makes it of its message, not of a name


def check_name(kind: str, name: Any, allowed: Iterable[str], hint: str = "") -> None:
    """Raise ``UnknownNameError`` unless it is one of the allowed names; it may be of any type."""
    if not isinstance(name, str) or name not in allowed:
        raise UnknownNameError(kind, name, allowed, hint)


class WriteError(BackdoorGymError, OSError):
    """Something cannot be written, as on a full disk or in a read-only folder; the files that were there are unharmed."""

    def __str__(self) -> str:
        return one_line(f"{self.filename} cannot be written: {self.strerror}")
