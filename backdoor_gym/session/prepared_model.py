"""An infected model made ready for episodes: its neurons, and what the defender's clean images show of them."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from threading import RLock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..analysis.bn_evidence import BNEvidence
from ..analysis.evidence import Evidence, find_evidence
from ..analysis.features import STATIC_FEATURES, neuron_features
from ..analysis.mask_gradient import mask_gradient
from ..analysis.neuron_graph import NeuronGraph, input_strengths, max_edges, neuron_graph
from ..analysis.suspected_target import SuspectedTarget
from ..analysis.trigger_inversion import InvertedTrigger
from ..devices import find_device
from ..errors import UntraceableError
from ..masking.fill import fill_values
from ..metrics import predict_logits, target_margin
from ..models.infected import InfectedModel
from ..neurons.finding import find_neurons
from ..neurons.layers import Neurons
from ..neurons.precision import InFloat32
from ..neurons.tracing import ROUNDING, same_logits
from .defender import Defender


@dataclass(frozen=True)
class Preparation:
    """How a model is made ready.

    Attributes:
        residual: "channel" prunes each neuron alone, "group" those that share a residual sum together.
        connections: strongest inputs that each neuron keeps as edges.
        similar: similarity links that each neuron keeps.
        clean_samples: how many of the defender's clean images to use, None for all.
        device: where networks run.
        fill: what pruned neurons give: "zero", or "mean" for their clean mean (``masking.fill``).
    """

    residual: str = "channel"
    connections: int = 4
    similar: int = 4
    clean_samples: int | None = None
    device: str = "cpu"
    fill: str = "zero"


#: Clean images that ``PreparedModel.gradients`` are taken on.
GRADIENT_IMAGES = 200
#: Share of the clean images that are fragile beside those that the whole network gets wrong.
UNSURE = 0.2
#: Static features by which a neuron stands out where it serves a backdoor, as drawings show it.
SUSPICIOUS = ("uclc", "kl", "pull")


@dataclass(frozen=True)
class MaskGradients:
    """Derivatives by the mask of each unit, float64 (units,): what pruning it takes away or adds, to first order.

    Attributes:
        pull: of the suspected target's mean margin under the inverted trigger; zeros where there is none.
        harm: of minus the clean cross-entropy.
        clean_pull: of the suspected target's mean margin on the clean images as they are; what pulls there too is no
            detector of a trigger.
    """

    pull: np.ndarray
    harm: np.ndarray
    clean_pull: np.ndarray


class PreparedModel:
    """One infected model. A *unit* is what one action prunes: a neuron, or a group of coupled ones.

    Episodes do not change it, and all environments of a process share it: all that takes long is done once.
    """

    def __init__(self, model: InfectedModel, options: Preparation) -> None:
        self.model = model
        self.options = options
        self.neurons: Neurons = find_neurons(model.network, model.clean.first(2).images)
        self.neurons.graph.to(find_device(options.device))
        self.units = self.neurons.units(options.residual)
        self._grouped = len(self.units) < len(self.neurons)
        self.clean = model.clean.first(options.clean_samples)
        self.preparing = RLock()

    def prepare(self) -> None:
        """Do now all that takes long, in one thread: environments of several threads may share the model."""
        with self.preparing:
            _ = self.logits, self.fragile, self.features, self.graph, self.fill, self.first_gradients

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model.name

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def defender(self) -> Defender:
        """What a defender holds of it."""
        return Defender(self.model.network, self.neurons, self.units, self.clean.images, self.clean.labels)

    @cached_property
    def evidence(self) -> Evidence:
        """The signs of a backdoor."""
        return find_evidence(self.neurons, self.clean.images, self.clean.labels)

    @property
    def bn_evidence(self) -> BNEvidence | None:
        """What the BN statistics say of a backdoor; None where there is no batch normalisation."""
        return self.evidence.bn

    @property
    def suspected(self) -> SuspectedTarget | None:
        """The suspected target and its evidence; None where there is no batch normalisation."""
        return None if self.bn_evidence is None else self.bn_evidence.suspected

    @cached_property
    def inverted(self) -> InvertedTrigger | None:
        """The trigger sought in the image; None where none can be."""
        return self.evidence.inverted

    def under(self, inverted: InvertedTrigger) -> "PreparedModel":
        """This model as if that trigger had been inverted; static features stay as they are."""
        _ = self.features, self.graph, self.fragile
        twin = copy(self)
        twin.__dict__.pop("first_gradients", None)
        twin.__dict__["inverted"] = inverted
        return twin

    @cached_property
    def features(self) -> np.ndarray:
        """Static features of each unit, float32 (units, F); of a group the largest of its neurons."""
        images = self.clean.images if self.bn_evidence is None else self.bn_evidence.images
        features = neuron_features(self.neurons.graph, self.neurons, images, self.clean.labels, self.inverted)
        if not self._grouped:
            return features
        return np.stack([features[unit].max(axis=0) for unit in self.units])

    @cached_property
    def neuron_features(self) -> np.ndarray:
        """Static features of each neuron, float32 (neurons, F); a neuron of a group has those of the group."""
        features = np.empty((len(self.neurons), self.features.shape[1]), dtype=np.float32)
        for unit, unit_features in zip(self.units, self.features, strict=True):
            features[unit] = unit_features
        return features

    @property
    def suspicion(self) -> np.ndarray:
        """How far each neuron stands out in its layer: the largest of its ``SUSPICIOUS`` features, float32 (neurons,)."""
        return self.neuron_features[:, [STATIC_FEATURES.index(name) for name in SUSPICIOUS]].max(axis=1)

    @cached_property
    def strengths(self) -> np.ndarray:
        """Connection strength of each neuron over the largest of its layer, float64 in [0, 1] (neurons,)."""
        return input_strengths(self.neurons.graph, self.neurons)

    @cached_property
    def logits(self) -> Tensor:
        """Of the network itself on the clean images, float32 (n, classes).

        Raises:
            UntraceableError: its record, made with three images, answers otherwise.
        """
        logits = predict_logits(self.model.network, self.clean.images)
        if not self.neurons.graph.meta["live"]:
            try:
                own = logits
                if self.neurons.graph.meta["computes_in"]:
                    with InFloat32():
                        own = predict_logits(self.model.network, self.clean.images)
                same = same_logits(predict_logits(self.neurons.graph, self.clean.images), own, ROUNDING)
            except Exception as error:  # the user's operations, on as many images as they were not recorded with
                raise UntraceableError(_counts_images(self.name, len(logits))) from error
            if not same:
                raise UntraceableError(_counts_images(self.name, len(logits)))
        return logits

    @cached_property
    def fragile(self) -> np.ndarray:
        """Which clean images are the first to be answered wrong, bool (n,): those that are wrong, and the least sure ones."""
        logits, labels = self.logits, self.clean.labels
        own = logits.gather(1, labels[:, None]).squeeze(1)
        margins = (own - logits.scatter(1, labels[:, None], -torch.inf).max(1).values).numpy()
        count = min(len(margins), int((margins <= 0).sum()) + round(UNSURE * len(margins)))
        fragile = np.zeros(len(margins), dtype=bool)
        fragile[np.argsort(margins, kind="stable")[:count]] = True
        return fragile

    @cached_property
    def unit_names(self) -> list[str]:
        """Name of each unit; the neurons of a group are joined by +."""
        return ["+".join(self.neurons.names[neuron] for neuron in unit) for unit in self.units]

    @cached_property
    def layer(self) -> np.ndarray:
        """Index of the layer of each unit (of a group: of its first neuron), int64 (units,)."""
        return self.neurons.layer_index[[unit[0] for unit in self.units]]

    @cached_property
    def graph(self) -> NeuronGraph:
        """Edges between units."""
        graph = neuron_graph(
            self.neurons.graph, self.neurons, connections=self.options.connections, similar=self.options.similar
        )
        if not self._grouped:
            return graph
        return self._between_units(graph)

    def _between_units(self, graph: NeuronGraph) -> NeuronGraph:
        """Edges between neurons as edges between their groups: of equal ones the strongest, at most the usual number."""
        unit_of = np.empty(len(self.neurons), dtype=np.int64)
        for index, unit in enumerate(self.units):
            unit_of[unit] = index
        links = unit_of[graph.edge_links]
        order = np.argsort(-graph.edges[:, 0], kind="stable")
        keys = np.column_stack([links, graph.edges[:, 1].astype(np.int64)])[order]
        _, first = np.unique(keys, axis=0, return_index=True)
        kept = np.sort(order[first])
        kept = kept[links[kept, 0] != links[kept, 1]]
        most = max_edges(len(self), self.options.connections, self.options.similar)
        kept = kept[np.sort(np.argsort(-graph.edges[kept, 0], kind="stable")[:most])]
        return NeuronGraph(graph.edges[kept], links[kept])

    def neuron_mask(self, pruned: np.ndarray) -> np.ndarray:
        """Pruned units, bool (units,), as a mask of neurons, bool (neurons,), True where kept."""
        if not self._grouped:
            return ~pruned
        mask = np.ones(len(self.neurons), dtype=bool)
        for index in np.flatnonzero(pruned):
            mask[self.units[index]] = False
        return mask

    @cached_property
    def fill(self) -> Tensor | None:
        """What each neuron gives where it is pruned, float32 (neurons,); None for zeros."""
        kind = self.options.fill
        return None if kind == "zero" else fill_values(self.neurons, self.clean.images, kind)

    @cached_property
    def first_gradients(self) -> MaskGradients:
        """Those of the whole network."""
        return self.gradients(np.zeros(len(self), dtype=bool))

    def gradients(self, pruned: np.ndarray) -> MaskGradients:
        """To first order, what one more prune would do, from clean images alone; ``pruned`` is bool (units,)."""
        mask = self.neuron_mask(pruned)
        clean = self.clean.first(GRADIENT_IMAGES)
        labels = clean.labels.to(self.options.device)
        harm = -self.by_mask(self.neurons, clean.images, lambda logits: F.cross_entropy(logits, labels), mask)
        inverted = self.inverted
        if inverted is None:
            return MaskGradients(np.zeros(len(self)), harm, np.zeros(len(self)))
        pull, clean_pull = (
            self.by_mask(self.neurons, images, lambda logits: target_margin(logits, inverted.target).mean(), mask)
            for images in (inverted.images, inverted.clean)
        )
        return MaskGradients(pull, harm, clean_pull)

    def by_mask(
        self, neurons: Neurons, images: Tensor, quantity: Callable[[Tensor], Tensor], mask: np.ndarray
    ) -> np.ndarray:
        """``mask_gradient`` by unit: of a group the sum over its neurons, float64 (units,)."""
        images = images.to(self.options.device, memory_format=torch.channels_last)
        return self.by_unit(mask_gradient(neurons, images, quantity, mask, self.fill))

    def by_unit(self, derivatives: Tensor) -> np.ndarray:
        """Derivatives by neuron, (neurons,), as those by unit: of a group the sum over its neurons, float64 (units,)."""
        by_neuron = derivatives.double().cpu().numpy()
        if not self._grouped:
            return by_neuron
        return np.array([by_neuron[unit].sum() for unit in self.units])


def _counts_images(name: str, count: int) -> str:
    return (
        f"the forward of {name} does other things with {count} images than with three, so that it cannot be followed; take out "
        "of it what depends on how many images there are (pieces of a batch, a branch on its length)"
    )
