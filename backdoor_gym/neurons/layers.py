"""The neurons of a network as data: layers, what feeds them, and where their masks are written."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import UnknownNameError, check_name
from .lowering import Lowered

RESIDUAL_MODES = ("channel", "group")


@dataclass(frozen=True, eq=False)
class Feeder:
    """A convolution or linear layer that writes into what a neuron layer reads.

    Attributes:
        module: its name in the graph.
        norms: normalisations between it and the neuron layer's own.
        rows: the neuron of the layer that each of its output channels is, -1 for none; int64 (channels,).
        upstream: indices of the neuron layers whose (masked) channels it reads, nearest first.
        columns: for each of these, the neuron that each input is of, -1 for none; int64 (inputs,).
        scale: normalisation without neurons that it reads directly, None for none.
    """

    module: str
    norms: tuple[str, ...]
    rows: np.ndarray
    upstream: tuple[int, ...]
    columns: tuple[np.ndarray, ...]
    scale: str | None = None

    def of_rows(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of the output channels that are neurons: their neurons, int64, and their part of ``values`` (channels, ...)."""
        rows = torch.from_numpy(self.rows)
        return rows[rows >= 0], values[rows >= 0]


@dataclass(frozen=True, eq=False)
class Part:
    """A layer whose weights hold the mask.

    Attributes:
        module: its name in the graph.
        weights: the network's parameters in whose rows zeros are written, each with the first row that it makes.
        biases: likewise, empty where there is none.
        units: the neuron that each row is of, -1 for none; int64 (rows,).
    """

    module: str
    weights: tuple[tuple[str, int], ...]
    biases: tuple[tuple[str, int], ...]
    units: np.ndarray

    def rows(self, pruned: np.ndarray) -> np.ndarray:
        """The rows of some neurons, bool (neurons,) to bool (rows,)."""
        return (self.units >= 0) & pruned[self.units]

    def by_neuron(self, values: Tensor, count: int) -> Tensor:
        """The mean of the rows of each neuron, (rows,) to (neurons,)."""
        units = torch.from_numpy(self.units).to(values.device)
        inside = units >= 0
        sums, sizes = (
            values.new_zeros(count).index_add(0, units[inside], of_rows[inside])
            for of_rows in (values, torch.ones_like(values))
        )
        return sums / sizes.clamp(min=1)

    def by_row(self, values: Tensor, rest: float) -> Tensor:
        """The value of each row's neuron, (neurons,) to (rows,); ``rest`` for rows of none."""
        units = torch.from_numpy(self.units).to(values.device)
        return torch.where(units >= 0, values[units], torch.full((), rest, dtype=values.dtype, device=values.device))


@dataclass(frozen=True, eq=False)
class NeuronLayer:
    """The neurons of one layer."""

    name: str
    #: The layers whose weights hold the mask: a normalisation, or the convolution or linear layer itself; several for heads.
    parts: tuple[Part, ...]
    #: Whether that is a batch normalisation.
    normalised: bool
    #: Name of the node of the traced graph whose value is masked; of several the first one.
    node: str
    size: int
    #: Index of the first neuron of the layer.
    start: int
    feeders: tuple[Feeder, ...]
    #: The class of each neuron, int64 (size,): those of one class share a residual sum.
    classes: np.ndarray
    #: Where the channels are in the node's value: 1, or -1 for the last axis.
    axis: int = 1

    @property
    def module(self) -> str:
        """Name in the graph of the layer whose weights hold the mask; of several the first one."""
        return self.parts[0].module

    @property
    def neurons(self) -> slice:
        """The neurons of this layer among all."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Account:
    """What became of a layer with weights, or of parameters that are no layer's.

    Attributes:
        name: of the layer.
        channels: how many it gives, 0 for parameters that make none.
        units: how many of these belong to a neuron.
        is_output: whether the logits come from it.
        reason: why not all of them do, None where they do.
        parameters: its parameters of two axes or more; each of the network's is in a single account.
    """

    name: str
    channels: int
    units: int
    is_output: bool = False
    reason: str | None = None
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Neurons:
    """The prunable neurons of a network, in network order.

    ::

        layers[0]  "conv1"            neurons 0 to 7     conv1[0], ..., conv1[7]
        layers[1]  "layer1.0.conv1"   neurons 8 to 15    layer1.0.conv1[0], ..., layer1.0.conv1[7]
            parts     bn1: zeros in row 5 of its weight and bias prune neuron 13
            feeders   layer1.0.conv1: its row 5 is neuron 13, its column 2 reads neuron 2 of layers[0] (upstream)
        mask          bool (16,), True where kept
        graph(images, mask of layers[0], mask of layers[1])  gives the logits

    Attributes:
        layers: the neuron layers.
        graph: a traced copy of the network (see ``tracing.trace``) that takes the images and one mask a layer: float (size,),
            or None for nothing pruned.
        accounts: of every layer with weights, and of every parameter of two axes or more.
        notes: what else is worth knowing, a sentence each: batch normalisations without neurons.
    """

    layers: tuple[NeuronLayer, ...]
    graph: fx.GraphModule
    accounts: tuple[Account, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(layer.size for layer in self.layers)

    @cached_property
    def names(self) -> list[str]:
        """The name of each neuron, such as ``layer3.0.conv1[57]``."""
        return [f"{layer.name}[{channel}]" for layer in self.layers for channel in range(layer.size)]

    @cached_property
    def layer_index(self) -> np.ndarray:
        """The index of the layer of each neuron, int64 (neurons,)."""
        return np.repeat(np.arange(len(self.layers)), [layer.size for layer in self.layers])

    def layer_in(self, network: nn.Module, name: str) -> nn.Module:
        """A layer by its name in the graph: the network's own where it has that one, else that of the traced copy."""
        lowered: Mapping[str, Lowered] = self.graph.meta["lowered"]
        return (network if lowered[name].is_plain else self.graph).get_submodule(name)

    @property
    def coverage(self) -> float:
        """Share of the channels of all layers with weights but the output that belong to a neuron."""
        inner = [account for account in self.accounts if not account.is_output]
        return sum(account.units for account in inner) / max(1, sum(account.channels for account in inner))

    @property
    def left_out(self) -> list[Account]:
        """What belongs to no neuron, or not with all channels, without the output; that with most such channels first."""
        left = [account for account in self.accounts if account.reason is not None and not account.is_output]
        return sorted(left, key=lambda account: account.units - account.channels)

    def index(self, name: str) -> int:
        """The neuron of that name.

        Raises:
            UnknownNameError: no such neuron.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownNameError("neuron", name, self.names) from None

    def units(self, residual: str = "channel") -> list[np.ndarray]:
        """What is pruned at a time: each neuron alone ("channel"), or with those it shares a residual sum with ("group").

        Raises:
            UnknownNameError: neither of the two.
        """
        check_name("residual mode", residual, RESIDUAL_MODES)
        if residual == "channel":
            return [np.array([neuron]) for neuron in range(len(self))]
        units: dict[int, list[int]] = {}
        for layer in self.layers:
            for channel, number in enumerate(layer.classes.tolist()):
                units.setdefault(number, []).append(layer.start + channel)
        return [np.array(members) for members in units.values()]

    def layer_masks(self, mask: np.ndarray, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """A mask of all neurons, bool (neurons,), True where kept, as one mask a layer for ``graph``."""
        parts = (mask[layer.neurons] for layer in self.layers)
        return [None if part.all() else torch.from_numpy(part.astype(np.float32)).to(device) for part in parts]

    def layer_fills(self, fill: Tensor | None, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """Constants of all neurons, float32 (neurons,), one tensor a layer; None for a layer that is filled with zeros alone."""
        if fill is None:
            return [None] * len(self.layers)
        parts = (fill[layer.neurons] for layer in self.layers)
        return [part.to(device) if part.any() else None for part in parts]
