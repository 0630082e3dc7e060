"""detect(): is there a backdoor in a network, and which label does it call? Nothing is pruned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .analysis.evidence import SILENT, VERDICT_THRESHOLD, Evidence
from .arguments import check_callable, check_path
from .devices import find_device
from .errors import DataError
from .models.catalogue import load_infected
from .models.infected import InfectedModel
from .progress import Watch
from .session.prepared_model import Preparation, PreparedModel
from .wording import printable
from .writing import finite


@dataclass(frozen=True, eq=False)
class Detection:
    """What the weights and the clean images say of a backdoor; the same figures as those of ``repair``.

    Attributes:
        infected: the model.
        probability: that it has a backdoor.
        evidence: the signs that this is computed from, and the inverted trigger.

    Examples:
        >>> from backdoor_gym import detect
        >>> detection = detect("digits-badnets")
        >>> detection.suspicious, detection.target, sorted(detection.evidence.signs)
        (True, 3, ['bn', 'mask'])
    """

    infected: InfectedModel
    probability: float
    evidence: Evidence

    @property
    def suspicious(self) -> bool:
        """Whether ``repair`` would prune it."""
        return self.probability >= VERDICT_THRESHOLD

    @property
    def target(self) -> int | None:
        """The label that the trigger seems to give; None where the evidence names none."""
        return self.evidence.target

    def report(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return finite(
            {
                "infected": self.infected.name,
                "suspicious": self.suspicious,
                "probability": self.probability,
                "threshold": VERDICT_THRESHOLD,
                "target": self.target,
                "signs": dict(self.evidence.signs),
                "clean_images": len(self.infected.clean),
            }
        )

    def save_trigger(self, file: str | Path) -> Path:
        """Write a picture (PNG): clean images, the same with the inverted trigger, and the difference.

        Raises:
            DataError: no trigger could be inverted.
            WriteError: the file cannot be written.
        """
        from .reporting.pictures import write_trigger

        check_path("the file of the picture", file)
        if self.evidence.inverted is None:
            raise DataError(f"no trigger could be inverted in {self.infected.name}: there is nothing to show")
        return write_trigger(self.evidence.inverted, Path(file))

    def __str__(self) -> str:
        if not self.evidence.signs:
            return f"{printable(self.infected.name)}: {SILENT}"
        label = "" if self.target is None or not self.suspicious else f", which calls label {self.target}"
        signs = "signs of a backdoor" if self.suspicious else "no sign of a backdoor"
        return f"{printable(self.infected.name)}: {signs}{label} (probability {self.probability:.0%})"


def detect(
    infected: str | Path | InfectedModel, *, data: str | None = None, device: str = "cpu", watch: Watch | None = None
) -> Detection:
    """Look for a backdoor in one network, with its weights and the defender's clean images alone.

    Args:
        infected: a model, a name, or a file.
        data: data set to read a file's images from, instead of the one it names.
        device: where the network runs.
        watch: called with what is being done, how much of it is done, and of how much (None where that is not known).

    Raises:
        DataError: an argument of a wrong type.
        BackdoorGymError: the model cannot be read or traced (see ``load_infected`` and ``find_neurons``).

    Examples:
        >>> from backdoor_gym import detect
        >>> print(detect("digits-badnets"))
        digits-badnets: signs of a backdoor, which calls label 3 (probability 97%)
        >>> detect("digits-clean").suspicious
        False
    """
    check_callable("watch", watch, may_be_none=True)
    find_device(device)
    watch = watch or (lambda what, done, total: None)
    watch("reading the neurons", 0, None)
    model = infected if isinstance(infected, InfectedModel) else load_infected(infected, data)
    prepared = PreparedModel(model, Preparation(device=device))
    watch("looking for a trigger", 0, None)
    return Detection(model, prepared.evidence.probability, prepared.evidence)
