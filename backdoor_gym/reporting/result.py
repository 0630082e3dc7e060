"""What a repair did: its figures, and the files that it is saved in."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..analysis.evidence import Evidence
from ..arguments import check_path
from ..errors import BackdoorGymError
from ..files.tensors import STATE_DICT, write_tensors
from ..masking.cutting import cut_channels
from ..metrics import Metrics
from ..models.infected import InfectedModel
from ..models.infected_files import packed
from ..networks.adapting import in_own_types
from ..networks.preprocessing import Preprocessed, own_module
from ..neurons.copying import taking_norms_off
from ..neurons.layers import Neurons
from ..outcomes import REPAIRED
from ..rendering.drawing import Snapshot, frame
from ..session.masked_model import NOTHING_LOST, Lost
from ..writing import as_json, beside, finite, write_text
from .page import render

#: Files in the folder that ``RepairResult.save`` writes; the network of transformers or timm has names of its own.
WEIGHTS, FIGURES, PICTURE, PAGE = "repaired.safetensors", "pruned.json", "repair.png", "report.html"


@dataclass(frozen=True)
class Change:
    """One step of a repair.

    Attributes:
        neurons: their names; several where coupled ones go together.
        given_back: whether they came back, after the last prune; False where they were pruned.
        acc: accuracy on the defender's clean images after it.
        suspected_danger: after it (see ``metrics.danger``), None where no trigger could be inverted.
    """

    neurons: tuple[str, ...]
    given_back: bool
    acc: float
    suspected_danger: float | None


@dataclass(frozen=True)
class RepairResult:
    """What a repair did.

    Attributes:
        network: the repaired network, from images in [0, 1] to logits: the class of the original, zeros written where neurons
            were pruned, or the constants of ``fill``. Where ``preprocess`` stands in front of it, ``module`` is the network behind.
        pruned: names of the neurons that stayed pruned, in the order in which they went.
        before: ACC, ASR and RA on test images before; None where test images or trigger are not known.
        after: the same afterwards.
        clean_acc_before: accuracy on the defender's clean images before.
        clean_acc_after: the same afterwards.
        der: defence effectiveness rating, where ACC and ASR are known.
        seconds: how long the policy took, with reading the neurons and without scoring.
        policy: name of the policy.
        settings: what the policy chose by itself, such as the threshold of CLP.
        infected: the model as it was.
        neurons: of the network.
        mask: bool (neurons,), False where pruned.
        snapshot: the network as it is drawn.
        features: static features of each neuron, standardised within its layer (``analysis.features``), float32 (neurons, F).
        course: what was pruned and given back, step by step.
        evidence: the signs of a backdoor, and the inverted trigger.
        arguments: what ``repair`` was called with, for doing it again; None for a model or a policy that is no name.
        outcome: "untouched", "repaired" or "unrepairable" (see ``repair``).
        verdict: probability that the network has a backdoor, before anything is pruned; None without a verdict.
        lost: fall of the mean probability of the true label on the half of the clean images that guards the accuracy, and its
            standard error. A look-ahead does not see these images, so other images may expect it; a published rule sees all.
        fill: what each neuron gives where it is pruned, float32 (neurons,); None for zeros.

    Examples:
        >>> from backdoor_gym import repair
        >>> result = repair("digits-badnets", "bnp")
        >>> len(result.pruned), round(result.before.asr, 2), round(result.after.asr, 2)
        (12, 1.0, 0.06)
    """

    network: nn.Module
    pruned: list[str]
    before: Metrics
    after: Metrics
    clean_acc_before: float
    clean_acc_after: float
    der: float | None
    seconds: float
    policy: str
    settings: dict[str, Any]
    infected: InfectedModel
    neurons: Neurons
    mask: np.ndarray
    snapshot: Snapshot
    features: np.ndarray
    course: tuple[Change, ...]
    evidence: Evidence
    arguments: dict[str, Any]
    outcome: str = REPAIRED
    verdict: float | None = None
    fill: Tensor | None = None
    lost: Lost = NOTHING_LOST

    @property
    def suspected_target(self) -> int | None:
        """The label that the signs point to; None where they point to none."""
        return self.evidence.target

    @property
    def module(self) -> nn.Module:
        """The repaired network without what stands in front of it: the class that was given to ``from_module``.

        Its weights are of the types that they were of there. Weight norm, spectral norm and other parametrizations are taken
        off: take them off another network of the class (``norms_off``) before it loads this state dict.
        """
        return in_own_types(own_module(self.network), self.infected.dtypes)

    @property
    def complete(self) -> bool:
        """Whether ``save`` writes an infected model; the state dict of ``module`` alone otherwise."""
        try:
            packed(self.infected)
        except BackdoorGymError:
            return False
        return self.infected.checkpoint is None

    @property
    def norms_off(self) -> str:
        """Python that takes weight norm and the like off another ``network`` of the class, which then loads these weights."""
        return taking_norms_off(self.infected.module)

    @property
    def coverage(self) -> float:
        """Share of the channels of all layers with weights but the output that belong to a neuron."""
        return self.neurons.coverage

    def compact(self) -> nn.Module:
        """A smaller network with the same outputs, from which the pruned channels are cut out where shapes allow.

        Where they stay although nothing needs them, a warning names the layer that stops the cut.

        Raises:
            CompactionError: the network cannot take the clean images.
        """
        cut = cut_channels(self.infected.network, self.neurons, self.mask, self.infected.clean.images, self.fill)
        for stop in cut.stops:
            warnings.warn(stop, stacklevel=2)
        if isinstance(cut.network, Preprocessed):
            cut.network.network = in_own_types(cut.network.network, self.infected.dtypes)
            return cut.network
        return in_own_types(cut.network, self.infected.dtypes)

    def report(self) -> dict[str, Any]:
        """All figures and the pruned neurons, JSON-able; None for those that are not finite."""
        figures: dict[str, Any] = {
            "infected": self.infected.name,
            "policy": self.policy,
            "settings": self.settings,
            "neurons": len(self.neurons),
            "coverage": round(self.coverage, 4),
            "left_out": [asdict(account) for account in self.neurons.left_out],
            "notes": list(self.neurons.notes),
            "pruned": self.pruned,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "der": self.der,
            "clean_acc_before": self.clean_acc_before,
            "clean_acc_after": self.clean_acc_after,
            "clean_images": len(self.infected.clean),
            "probability_lost": self.lost.mean,
            "probability_lost_error": self.lost.error,
            "seconds": round(self.seconds, 3),
            "outcome": self.outcome,
            "verdict": self.verdict,
            "signs": dict(self.evidence.signs),
            "suspected_target": self.suspected_target,
            "arguments": self.arguments,
            "course": [asdict(change) for change in self.course],
        }
        return finite(figures)

    def save(self, folder: str | Path, command: str | None = None) -> list[Path]:
        """Write the repaired network, ``report.html``, ``pruned.json`` and ``repair.png`` into a folder, made if needed.

        A network of a known architecture is saved as an infected model, ready for another ``repair``, where its file can hold all
        that is known of it (see ``InfectedModel.save``). One out of a folder of
        transformers or timm is saved as that folder was. Any other one, and one out of somebody's checkpoint, is saved as the
        state dict of ``module``, for its own class to load. All files are written, or none.

        Args:
            folder: where to.
            command: the command line that asked for this repair, to be told in the report.

        Raises:
            WriteError: the folder cannot be written.
        """
        from matplotlib.image import imsave

        check_path("the folder", folder)
        folder = Path(folder)
        page, picture = render(self, command), frame(self.snapshot)
        with beside(folder) as new:
            self._save_network(new)
            write_text(new / FIGURES, as_json(self.report(), indent=2) + "\n")
            imsave(new / PICTURE, picture)
            write_text(new / PAGE, page)
        return [folder / name for name in files_of(self.infected)]

    def _save_network(self, folder: Path) -> None:
        original = self.infected
        if original.layout is not None:
            original.layout.save(folder, self.module)
        elif self.complete:
            InfectedModel(
                self.network,
                original.clean,
                original.test,
                original.trigger,
                original.target,
                original.architecture,
                {**original.facts, "repaired_by": self.policy, "acc": self.after.acc, "asr": self.after.asr},
                f"{original.name}-repaired",
            ).save(folder / WEIGHTS)
        else:
            write_tensors(folder / WEIGHTS, self.module.state_dict(), {"format": STATE_DICT})


def files_of(infected: InfectedModel) -> list[str]:
    """Names of the files that a repair of this model writes."""
    network = [WEIGHTS] if infected.layout is None else list(infected.layout.files)
    return [*network, FIGURES, PICTURE, PAGE]
