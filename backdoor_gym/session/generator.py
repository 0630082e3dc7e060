"""Which infected model an episode gets."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from ..arguments import check_kind
from ..errors import DataError
from ..models.catalogue import load_infected, max_neurons, resolve
from ..models.infected import InfectedModel, refuse_module
from ..neurons.finding import find_neurons
from .prepared_model import Preparation, PreparedModel

MODEL = (str, Path, InfectedModel)
Infected = str | Path | InfectedModel | Sequence[str | Path | InfectedModel]

Ready = OrderedDict[Hashable, PreparedModel]

#: Models that stay ready (without activations): to find the trigger of one takes longer than many prunes.
READY = 384
#: Those with a name or a file, for all environments of the process.
_SHARED: Ready = OrderedDict()
_LOCK = RLock()


class InfectedGenerator:
    """Draws one of the given models for each episode and makes it ready.

    Args:
        infected: a name, a pattern such as ``digits-train/*``, a file, a model, or several of them.
        options: how models are made ready.
        data: data set to read the images of files from, instead of the one they name.
    """

    def __init__(self, infected: Infected, options: Preparation, data: str | None = None) -> None:
        self.options = options
        self.data = data
        given = [infected] if isinstance(infected, MODEL) or not isinstance(infected, Iterable) else list(infected)
        self._entries: list[str | InfectedModel] = []
        for entry in given:
            check_model(entry)
            self._entries.extend([entry] if isinstance(entry, InfectedModel) else resolve(str(entry)))
        if not self._entries:
            raise DataError("no infected model was given: infected=[] is empty")
        self._own: Ready = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def max_units(self) -> int:
        """The most units that a model can have; families declare it, other models are loaded to find out."""
        most = 0
        for entry in self._entries:
            declared = None if isinstance(entry, InfectedModel) else max_neurons(entry)
            if declared is not None:
                most = max(most, declared)
            elif len(self._entries) == 1:
                most = len(self.get(entry))
            else:
                model = entry if isinstance(entry, InfectedModel) else load_infected(entry, self.data)
                most = max(most, len(find_neurons(model.network, model.clean.first(2).images)))
        return most

    def draw(self, random: np.random.Generator) -> PreparedModel:
        """A model drawn uniformly."""
        return self.get(self._entries[int(random.integers(len(self._entries)))])

    def get(self, entry: str | Path | InfectedModel) -> PreparedModel:
        """That model, made ready.

        Raises:
            DataError: no name, file or model.
        """
        check_model(entry)
        if isinstance(entry, InfectedModel):  # given as an object, it may be changed: no other environment shares it
            return _remembered(self._own, id(entry), lambda: PreparedModel(entry, self.options))
        name = str(entry)
        key = (name, _version(name), self.data, self.options)
        return _remembered(_SHARED, key, lambda: PreparedModel(load_infected(name, self.data), self.options))


def check_model(entry: Any) -> None:
    """Raise ``DataError`` unless it is the name or the file of a model, or a model."""
    refuse_module(entry)
    check_kind(
        "infected", entry, MODEL, "the name or the file of an infected model, an InfectedModel, or a list of these"
    )


def _remembered(ready: Ready, key: Hashable, make: Callable[[], PreparedModel]) -> PreparedModel:
    """What was made ready under that key, made now if need be; what was used longest ago is forgotten."""
    with _LOCK:
        if key not in ready:
            ready[key] = make()
            if len(ready) > READY:
                ready.popitem(last=False)
        ready.move_to_end(key)
        return ready[key]


def _version(entry: str) -> tuple[int, int] | None:
    """What changes when a file is written again; None for a name."""
    if not os.path.isfile(entry):  # which takes any text, also of 5,000 characters
        return None
    facts = os.stat(entry)
    return facts.st_mtime_ns, facts.st_size
