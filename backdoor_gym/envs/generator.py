"""Which infected model an episode gets."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..infected import InfectedModel
from ..pruning.neurons import find_neurons
from ..zoo.catalogue import load_infected, max_neurons, resolve
from .victim import Victim, VictimOptions

Infected = str | Path | InfectedModel | Sequence[str | Path | InfectedModel]

#: Models that stay ready between episodes (without their activations).
READY = 128


class InfectedGenerator:
    """Draws one of the given models for each episode and makes it ready.

    Args:
        infected: a name, a pattern such as ``digits-train/*``, a file, a model, or several of them.
        options: how models are made ready.
        data: data set to read the images of files from, instead of the one they name.
    """

    def __init__(self, infected: Infected, options: VictimOptions, data: str | None = None) -> None:
        self.options = options
        self.data = data
        given = [infected] if isinstance(infected, str | Path | InfectedModel) else list(infected)
        self._entries: list[str | InfectedModel] = []
        for entry in given:
            self._entries.extend([entry] if isinstance(entry, InfectedModel) else resolve(str(entry)))
        if not self._entries:
            raise DataError("no infected model was given: infected=[] is empty")
        self._ready: OrderedDict[str | int, Victim] = OrderedDict()

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
                most = max(most, len(find_neurons(model.network)))
        return most

    def draw(self, random: np.random.Generator) -> Victim:
        """A model drawn uniformly."""
        return self.get(self._entries[int(random.integers(len(self._entries)))])

    def get(self, entry: str | InfectedModel) -> Victim:
        """That model, made ready."""
        key = id(entry) if isinstance(entry, InfectedModel) else entry
        if key not in self._ready:
            model = entry if isinstance(entry, InfectedModel) else load_infected(entry, self.data)
            self._ready[key] = Victim(model, self.options)
            if len(self._ready) > READY:
                self._ready.popitem(last=False)
        self._ready.move_to_end(key)
        return self._ready[key]
