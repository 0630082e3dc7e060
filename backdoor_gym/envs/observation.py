"""Observations: a dictionary of fixed-shape arrays, padded where models of several sizes are met."""

import math

import numpy as np
from gymnasium import spaces

from ..analysis.features import CLAMP, STATIC_FEATURES
from ..analysis.neuron_graph import EDGE_FEATURES, max_edges
from ..errors import DataError
from ..session import RepairSession
from ..session.prepared_model import PreparedModel

#: Columns of ``nodes``: the static features, then what the episode changes, then 1 (0 in padding).
NODE_FEATURES = (*STATIC_FEATURES, "pruned", "tried", "layer_pruned", "pull_now", "harm_now", "clean_pull_now", "real")
#: Entries of ``globals``.
GLOBAL_FEATURES = (
    "accuracy",
    "accuracy_drop",
    "loss_increase",
    "accuracy_budget",
    "pruned",
    "steps_left",
    "failures_left",
    "suspected_danger",
    "suspected_drop",
    "shift",
    "inversion_error",
    "inversion_evidence",
    "verdict",
)
_STATIC = len(STATIC_FEATURES)


class ObservationBuilder:
    """Makes observations of one fixed space for models of up to ``max_units`` units."""

    def __init__(self, max_units: int, connections: int, similar: int) -> None:
        self.max_units = max_units
        self.max_edges = max_edges(max_units, connections, similar)
        # A standardised score of n values cannot exceed (n - 1) / sqrt(n).
        bound = max(CLAMP, float(np.sqrt(max_units)))
        box = spaces.Box
        self.space = spaces.Dict(
            {
                "nodes": box(-bound, bound, (max_units, len(NODE_FEATURES)), np.float32),
                "edges": box(0.0, 1.0, (self.max_edges, len(EDGE_FEATURES)), np.float32),
                "edge_links": box(0, max(0, max_units - 1), (self.max_edges, 2), np.int64),
                "num_nodes": box(0, max_units, (1,), np.int64),
                "num_edges": box(0, self.max_edges, (1,), np.int64),
                "action_mask": box(0, 1, (max_units + 1,), np.int8),
                "globals": box(-CLAMP, CLAMP, (len(GLOBAL_FEATURES),), np.float32),
            }
        )
        self._prepared: PreparedModel | None = None
        self._evidence: tuple[float, ...] = ()
        self._nodes = np.zeros(0)
        self._edges = np.zeros(0)
        self._edge_links = np.zeros(0)

    def check_room(self, prepared: PreparedModel) -> None:
        """Raise ``DataError`` where the model has more units than the space."""
        if len(prepared) > self.max_units:
            raise DataError(
                f"{prepared.name} has {len(prepared)} neurons, and this environment's spaces have room for "
                f"{self.max_units}; name it in infected= when the environment is made, or raise max_units"
            )

    def observe(self, session: RepairSession, steps_left: float, action_mask: np.ndarray) -> dict[str, np.ndarray]:
        """The observation of a repair as it is now; ``steps_left`` is a share."""
        prepared, state = session.prepared, session.state
        if prepared is not self._prepared:
            self._lay_out(prepared)
        count = len(prepared)
        nodes = self._nodes.copy()
        nodes[:count, _STATIC] = state.pruned
        nodes[:count, _STATIC + 1] = state.tried
        sizes = np.bincount(prepared.layer)
        shares = np.bincount(prepared.layer, weights=state.pruned) / np.maximum(sizes, 1)
        nodes[:count, _STATIC + 2] = shares[prepared.layer]
        gradients = session.derivatives()
        for column, gradient in enumerate((gradients.pull, gradients.harm, gradients.clean_pull), start=_STATIC + 3):
            nodes[:count, column] = np.clip(gradient / max(gradient.std(), 1e-12), -CLAMP, CLAMP)
        current, initial = session.figures, session.initial_figures
        figures = (
            current.acc,
            initial.acc - current.acc,
            current.loss - initial.loss,
            1.0 if session.accuracy_budget is None else session.accuracy_budget,
            state.pruned.mean(),
            steps_left,
            1 - state.failures / session.max_failures,
            current.suspected_danger,
            initial.suspected_danger - current.suspected_danger,
            *self._evidence,
        )
        return {
            "nodes": nodes,
            "edges": self._edges.copy(),
            "edge_links": self._edge_links.copy(),
            "num_nodes": np.array([count], dtype=np.int64),
            "num_edges": np.array([len(prepared.graph.edges)], dtype=np.int64),
            "action_mask": action_mask.astype(np.int8),
            "globals": np.clip(np.array(figures, dtype=np.float32), -CLAMP, CLAMP),
        }

    def _lay_out(self, prepared: PreparedModel) -> None:
        """The parts that stay the same in all episodes of a model."""
        count, edges = len(prepared), len(prepared.graph.edges)
        self._nodes = np.zeros((self.max_units, len(NODE_FEATURES)), dtype=np.float32)
        self._nodes[:count, :_STATIC] = prepared.features
        self._nodes[:count, -1] = 1
        self._edges = np.zeros((self.max_edges, len(EDGE_FEATURES)), dtype=np.float32)
        self._edges[:edges] = prepared.graph.edges
        self._edge_links = np.zeros((self.max_edges, 2), dtype=np.int64)
        self._edge_links[:edges] = prepared.graph.edge_links
        self._evidence = (*evidence(prepared), prepared.evidence.probability)
        self._prepared = prepared


def evidence(prepared: PreparedModel) -> tuple[float, ...]:
    """What tells an infected from a clean network as a whole; zeros where the BN statistics cannot tell.

    2 + log10 of the shift of BN means; of the inverted trigger the error and the evidence. Scores within a layer cannot
    tell a clean network, since every layer has a largest one. These keep their scale. The rise and the margin of the
    suspected target and the size of the trigger do not: they depend on depth, augmentation and image size.
    """
    suspected, inverted = prepared.suspected, prepared.inverted
    if suspected is None or inverted is None:
        return 0.0, 0.0, 0.0
    return 2 + math.log10(max(suspected.shift, 1e-4)), inverted.error, inverted.evidence
