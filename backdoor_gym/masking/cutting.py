"""Channels cut out of a network: a smaller one of the same class that gives the same outputs."""

from collections.abc import Mapping
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import CompactionError
from ..networks.adapting import deep_copy
from ..networks.preprocessing import own_module
from ..neurons.channel_origin import classes, is_depthwise, joined
from ..neurons.channels import WEIGHTED, Channels, Kind, module_of
from ..neurons.labels import UNKNOWN, ZERO, Labels
from ..neurons.layers import Neurons
from ..neurons.operations import MOVES, operation
from ..neurons.recording import in_words, watching
from ..neurons.tracing import same_logits
from ..wording import first_line
from .constants import Move, Reading, move, readings
from .export import write_mask

#: Largest difference of logits, over the largest of them, that rounding may make.
ROUNDING = 1e-4
#: Numbers that layers keep of their own size, by the axis of their weight.
_SIZES = (
    ("out_channels", "out_features", "num_features", "num_channels", "num_parameters"),
    ("in_channels", "in_features"),
)


class Cut(NamedTuple):
    """A network without its useless channels.

    Attributes:
        network: the smaller one.
        stops: why pruned channels that nothing needs could not be cut out, a sentence each.
    """

    network: nn.Module
    stops: tuple[str, ...]


class _Piece(NamedTuple):
    """What is cut out of one tensor: these places along an axis, which are of so many channels.

    With groups, those of a convolution, places of axis 1 are counted through all groups.
    """

    tensor: str
    axis: int
    groups: int
    places: tuple[int, ...]
    channels: int


#: Where the constants of what is cut out go, by the weight, axis and groups of the layer that reads them.
_Moves = Mapping[tuple[str, int, int], Move]


def cut_channels(
    network: nn.Module, neurons: Neurons, mask: np.ndarray, images: Tensor, fill: Tensor | None = None
) -> Cut:
    """A smaller network without the channels that the mask makes useless, with the same outputs.

    A channel can be cut where everything that reads it reads zeros: in a residual network, where all neurons that share
    a sum are pruned. The others are zeroed as in ``write_mask``. At least two channels a layer stay. Each group of a convolution
    loses as many, those of the group with the fewest useless ones. Where the network's own code
    counts on a number of channels (``view(-1, 64)``) they stay as well, and ``stops`` names the layer.

    Where pruned neurons give constants, these go into the bias of the layer that reads them, or the mean of the BN behind it.
    Where they cannot go there exactly, as before a convolution that pads with zeros, the channel stays, as a constant.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        mask: bool (neurons,), True where kept.
        images: float32 (n, C, H, W), to check that its outputs stay the same.
        fill: what each neuron gives where it is pruned, float32 (neurons,); None for zeros.

    Raises:
        CompactionError: the network cannot take the images.
    """
    masked = write_mask(network, neurons, mask, fill=fill).cpu().eval()
    images = images[:64].cpu()
    try:
        with torch.no_grad():
            expected = masked(images.clone())
    except Exception as error:  # the user's code, which can raise anything
        raise CompactionError(
            f"{type(own_module(network)).__name__} cannot take these images, to check a cut with: {error}"
        ) from error
    plan = _Plan(masked, neurons, mask, images, fill)
    groups, stops = plan.groups(), plan.stops()
    if not groups and not mask.all() and not stops:
        return Cut(masked, (_none_alone(neurons, mask),))
    everything = [piece for group in groups for part in group for piece in part]
    compact, _ = _attempt(masked, everything, plan.moves, images, expected)
    if compact is not None:
        return Cut(compact, tuple(stops))
    accepted: list[_Piece] = []

    def without(pieces: list[_Piece]) -> str | None:
        """Cut these, too, or tell why not."""
        nonlocal compact
        smaller, reason = _attempt(masked, [*accepted, *pieces], plan.moves, images[:3], expected[:3])
        if smaller is None:
            return reason or plan.difference(pieces[0])
        compact = smaller
        accepted.extend(pieces)
        return None

    refused: dict[tuple[str, str], int] = {}
    for group in groups:
        reason = without([piece for part in group for piece in part])
        if reason is not None:
            reasons = [without(part) for part in group] if len(group) > 1 else [reason]
            for part, why in zip(group, reasons, strict=True):
                if why is not None:
                    key = _layer_of(part), reason if None not in reasons else why
                    refused[key] = refused.get(key, 0) + part[0].channels
    stops += [_stop(count, layer, why) for (layer, why), count in refused.items()]
    return Cut(masked if compact is None else compact, tuple(stops))


def _words(node: fx.Node) -> str:
    where = node.meta.get("where") or "the network's own forward"
    return f"{operation(node)} in {where}"


def _in_order(labels: Labels | None) -> np.ndarray:
    """The labels of a value, each once, as they come; int64."""
    flat = np.zeros(0, dtype=np.int64) if labels is None else labels.thin.flatten().long().numpy()
    return flat[np.sort(np.unique(flat, return_index=True)[1])]


def _layer_of(part: list[_Piece]) -> str:
    return part[0].tensor.rpartition(".")[0] or part[0].tensor


def _none_alone(neurons: Neurons, mask: np.ndarray) -> str:
    """Why nothing was cut where each pruned channel meets one that was kept."""
    names = [layer.name for layer in neurons.layers if not mask[layer.neurons].all()]
    few = f"{', '.join(names[:4])}{', ...' if names[4:] else ''}"
    return (
        f"no pruned channel could be cut out: those of {few} are added to channels that were kept, or multiply them as gates, so "
        'that they are needed there, as zeros or constants; residual="group" prunes what is added together'
    )


def _stop(count: int, layer: str, reason: str) -> str:
    return f"{count} pruned channels of {layer} could not be cut out: {reason}"


def _attempt(
    network: nn.Module, pieces: list[_Piece], moves: _Moves, images: Tensor, expected: Tensor
) -> tuple[nn.Module | None, str]:
    """A copy without these pieces, or None and why it cannot run; no reason where it would answer differently."""
    smaller = deep_copy(network)
    path: list[str] = []

    def leave(*_: object) -> None:
        path.pop()

    try:
        with watching(smaller, lambda name, _: path.append(name), leave), torch.no_grad():
            _remove(smaller, pieces, moves)
            logits = smaller(images.clone())
    except Exception as error:  # the user's code, made for other numbers of channels
        return None, f"{in_words(path[-1] if path else '')} counts on their number ({first_line(error)})"
    if not same_logits(logits, expected, ROUNDING):
        return None, ""
    return smaller, ""


def _remove(network: nn.Module, pieces: list[_Piece], moves: _Moves) -> None:
    places: dict[tuple[str, int, int], set[int]] = {}
    for piece in pieces:
        places.setdefault(piece[:3], set()).update(piece.places)
    for where, gone in places.items():  # all of them while weights and biases are whole
        if where in moves:
            moves[where].do(network, gone)
    for (name, axis, groups), gone in places.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = network.get_submodule(owner_name)
        tensor = getattr(owner, attribute)
        size = tensor.shape[axis] * groups
        left = torch.tensor([place for place in range(size) if place not in gone], dtype=torch.int64)
        # A group of a convolution has inputs of its own: as many of them, elsewhere.
        inputs = left.view(groups, -1) % tensor.shape[axis]
        rows = tensor.chunk(groups) if groups > 1 else [tensor]
        smaller = torch.cat([group.index_select(axis, of_group) for group, of_group in zip(rows, inputs, strict=True)])
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, tensor.requires_grad)
        setattr(owner, attribute, smaller)
        for number in _SIZES[min(axis, 1)]:
            if getattr(owner, number, None) == size:
                setattr(owner, number, len(left))
        if axis == 0 and getattr(owner, "groups", 1) == size == getattr(owner, "in_channels", 0):  # depthwise
            owner.groups = owner.in_channels = len(left)  # type: ignore[assignment]


class _Plan:
    """Which channels nothing needs, and where they are in the tensors of the network.

    Channels of one class (those that a sum joins) can only go together. A class is *needed* where something reads it that is
    neither zero nor a constant that can go into its bias, or where something works on all of its channels together.

    Attributes:
        needed: for each class, whether it has to stay, bool (classes,).
        along: axes of tensors of the network that channels lie along: name, axis, in how many groups, and the label of each place.
        grouped: what each group of a convolution reads or gives: its name, and labels, int64 (groups, channels of a group).
        moves: where constants go.
    """

    def __init__(
        self, network: nn.Module, neurons: Neurons, mask: np.ndarray, images: Tensor, fill: Tensor | None = None
    ) -> None:
        self.network, self.neurons, self.mask = network, neurons, mask
        self.fill = np.zeros(len(neurons), dtype=np.float32) if fill is None else fill.numpy()
        self.channels = Channels(neurons.graph)
        #: Labels that a mask takes away, and those of the same layers that it leaves.
        self.gone, self.left = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.zero, self.constant = self._zeros_and_constants()
        self.readings: dict[fx.Node, Reading] = {}
        if fill is not None and (self.constant & ~self.zero).any():
            self.readings = readings(self.channels, neurons, mask, fill, images)
        self.moves: dict[tuple[str, int, int], Move] = {}
        self.classes = classes(self.channels, depthwise=True)
        self.needed = np.zeros(self.classes.max() + 1, dtype=bool)
        #: What needs a class of channels whatever they hold, and the first layer that reads what is not zero in it.
        self.held: dict[int, str] = {}
        self.read: dict[int, str] = {}
        self.along: list[tuple[str, int, int, np.ndarray]] = []
        self.grouped: list[tuple[str, np.ndarray]] = []
        for node in self.channels.nodes:
            self._look_at(node)
        self._keep_what_has_to_stay()

    def groups(self) -> list[list[list[_Piece]]]:
        """What to cut, by what should go together, in parts that can go alone: the channels that lie along the same tensors."""
        dead = [self._dead(labels) for *_, labels in self.along]
        where: dict[int, list[int]] = {}
        for index, (*_, labels) in enumerate(self.along):
            for number in np.unique(self.classes[labels[dead[index]]]).tolist():
                where.setdefault(number, []).append(index)
        parts: dict[tuple[int, ...], list[int]] = {}
        for number, indices in where.items():
            parts.setdefault(tuple(indices), []).append(number)
        # Those of one layer go together.
        group_of = joined(len(dead), [(np.array(part), np.full(len(part), part[0])) for part in parts])
        groups: dict[int, list[list[_Piece]]] = {}
        for part, numbers in parts.items():
            pieces = []
            for index in part:
                tensor, axis, groups_of, labels = self.along[index]
                places = np.flatnonzero(dead[index] & np.isin(self.classes[np.maximum(labels, 0)], numbers))
                pieces.append(_Piece(tensor, axis, groups_of, tuple(places.tolist()), len(numbers)))
            groups.setdefault(group_of[part[0]], []).append(pieces)
        return list(groups.values())

    def difference(self, piece: _Piece) -> str:
        """Why the network would answer differently without these: an order of channels can hang on their number."""
        labels = next(labels for *tensor, labels in self.along if tensor == [*piece[:3]])
        numbers = self.classes[labels[list(piece.places)]]
        for node in self.channels.nodes if len(numbers) else ():
            for source in self.channels.inputs(node) if operation(node) in MOVES else ():
                before, after = (_in_order(self.channels.labels[value]) for value in (source, node))
                moved = not np.array_equal(before[np.isin(before, after)], after[np.isin(after, before)])
                if moved and np.isin(self.classes[before[before > 0]], numbers).any():
                    return f"{_words(node)} puts channels into an order that hangs on their number"
        return "without them the network would answer differently"

    def stops(self) -> list[str]:
        """Pruned channels that something needs although no neuron gives them anything, by layer, and what that is.

        Where neurons that were kept are added to them, nothing is said: there they are no longer the pruned ones' alone.
        """
        counts: dict[tuple[str, str], int] = {}
        gone, left = (set(self.classes[labels].tolist()) for labels in (self.gone, self.left))
        for node in self.channels.nodes:
            if self.channels.kinds[node] is Kind.WEIGHTED:
                name = self.channels.lowered[str(node.target)].name
                for number in self.classes[self.channels.made(node)].tolist():
                    if number in gone and number not in left and self.needed[number]:
                        why = self.held.get(number) or f"{self.read[number]} reads what is added to them"
                        counts[name, why] = counts.get((name, why), 0) + 1
        return [_stop(count, name, why) for (name, why), count in counts.items()]

    def _need(self, labels: np.ndarray, reasons: dict[int, str], reason: str) -> None:
        numbers = np.unique(self.classes[labels[labels > 0]])
        self.needed[numbers] = True
        for number in numbers.tolist():
            reasons.setdefault(number, reason)

    def _keep_what_has_to_stay(self) -> None:
        """Need more of them until each group of a convolution loses as many channels, and each layer keeps two of its own."""
        before = -1
        while before < self.needed.sum():
            before = self.needed.sum()
            for name, labels in sorted(
                self.grouped, key=lambda side: -len(side[1])
            ):  # large groups are made of small ones
                dead = self._dead(labels)
                lost = min(int(dead.sum(axis=1).min()), labels.shape[1] - 1)
                for of_group, dead_of_group in zip(labels, dead, strict=True):
                    why = f"{name} is a convolution in groups, and each has to lose as many"
                    self._need(of_group[dead_of_group][lost:], self.held, why)
            for *_, labels in self.along:  # an axis of a single channel would be taken away by ``squeeze()``
                dead = self._dead(labels)
                lacking = max(0, 2 - int((~dead).sum()))
                self._need(labels[dead][:lacking], self.held, "a layer keeps two channels at least")

    def _dead(self, labels: np.ndarray) -> np.ndarray:
        """Which places are of channels that nothing needs, bool like the labels."""
        return (labels > 0) & ~self.needed[self.classes[np.maximum(labels, 0)]]

    def _need_all(self, node: fx.Node, by: fx.Node) -> None:
        labels = self.channels.labels[node]
        if labels is not None:
            layer = self.channels.lowered.get(str(by.target))
            what = _words(by) if layer is None else layer.name
            self._need(np.unique(labels.thin.long().numpy()), self.held, f"{what} works on all of them together")

    def _look_at(self, node: fx.Node) -> None:
        """Find out what the node needs of what it reads."""
        channels, kind = self.channels, self.channels.kinds[node]
        inputs = channels.inputs(node)
        if kind in (Kind.WEIGHTED, Kind.NORM):
            self._look_at_layer(node, inputs[0])
        elif kind in (Kind.LIVE_NORM, Kind.MIXING, Kind.OPAQUE) or channels.labels[node] is None:
            for value in (node, *inputs):  # all of them count there, if only for the statistics
                self._need_all(value, node)
        elif operation(node) == "scaled_dot_product_attention":
            for value in inputs[:2]:
                self._need_all(value, node)
        else:
            if any(channels.labels[value] is None for value in inputs):
                self._need_all(node, node)
            self._look_beside(node)

    def _look_at_layer(self, node: fx.Node, source: fx.Node) -> None:
        channels, module = self.channels, module_of(self.neurons.graph, node)
        layer = channels.lowered[str(node.target)]
        made, read = channels.made(node), channels.read(node)
        groups, calls = getattr(module, "groups", 1), len(channels.uses(node))
        if channels.labels[source] is not None and (read == UNKNOWN).all():
            self._need_all(source, node)
        if calls > 1:  # other uses would have to change too
            self._need(np.concatenate([made, read]), self.held, f"{layer.name} is used several times")
        elif groups > 1 and is_depthwise(channels, node) and (read > 0).all():
            groups = 1
        elif isinstance(module, WEIGHTED):
            if groups > 1:
                self.grouped += [(layer.name, labels.reshape(groups, -1)) for labels in (made, read)]
            self._need(read[~self.constant[np.maximum(read, 0)]], self.read, layer.name)
            self._move_constants(node, read, groups)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and (read == UNKNOWN).any():
            self._need(made, self.held, f"what {layer.name} reads could not be followed")
        if calls > 1:
            return
        for name in layer.tensors:
            shape = attrgetter(name)(self.network).shape
            if shape and shape[0] == len(made):
                self.along.append((name, 0, 1, made))
            if len(shape) > 1 and isinstance(module, WEIGHTED) and shape[1] * groups == len(read):
                self.along.append((name, 1, groups, read))

    def _move_constants(self, node: fx.Node, read: np.ndarray, groups: int) -> None:
        """Find out where the constants that a layer reads can go; need those that can go nowhere."""
        number = np.maximum(read, 0)
        constant = (read > 0) & self.constant[number] & ~self.zero[number]
        if not constant.any():
            return
        reading, layer = self.readings[node], self.channels.lowered[str(node.target)]
        why = f"what {layer.name} reads of them is not the same everywhere, and cannot go into its bias"
        self._need(read[constant & ~reading.steady], self.held, why)
        moved = move(self.channels, node, self.network, reading.values)
        if isinstance(moved, str):
            self._need(read[constant & reading.steady], self.held, moved)
        else:
            self.moves[moved.weight, 1, groups] = moved

    def _look_beside(self, node: fx.Node) -> None:
        """Parameters that an operation reads beside channels, one for each of them."""
        labels = self.channels.labels[node]
        if labels is None or self.channels.kinds[node] is Kind.MASK:
            return
        varying = [axis for axis, size in enumerate(labels.thin.shape) if size > 1]
        first = varying[0] if varying else 0
        for source in node.all_input_nodes:
            shape = source.meta.get("shape")
            if source.op != "get_attr" or not shape or max(shape) == 1:
                continue
            if operation(node) == "prelu":
                axis, place = 1, 0
            else:  # of a smaller rank, axes are counted from the last one
                axis, place = first, len(shape) - (len(labels.shape) - first if varying else 0)
            if not 0 <= place < len(shape) or shape[place] == 1:
                continue
            along = labels.along(axis)
            parameter = source.meta["parameter"]
            if len(varying) != 1 or len(along) != shape[place] or parameter is None:
                self._need_all(node, node)
            else:
                self.along.append((parameter, place, 1, along))

    def _zeros_and_constants(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each label, whether it is of zeros, and of a constant, whatever the image; both bool (labels,).

        Constants are followed where neurons are filled with them. What they are, the pass of the network tells.
        """
        channels, follows = self.channels, bool(self.fill.any())
        zero = np.zeros(channels.count, dtype=bool)
        zero[ZERO] = True
        constant = zero.copy()
        for block in channels.blocks:
            kind, own = channels.kinds[block.node], block.own
            zeros, constants = (
                [np.where(parents == UNKNOWN, False, of[np.maximum(parents, 0)]) for parents in block.parents]
                for of in (zero, constant)
            )
            if kind is Kind.MASK:
                pruned, zeroed = self._pruned(block.node, block.parents[0])
                zero[own], constant[own] = np.where(pruned, zeroed, zeros[0]), pruned | constants[0]
            elif kind is Kind.SUM:
                zero[own], constant[own] = np.logical_and.reduce(zeros), np.logical_and.reduce(constants)
            elif kind is Kind.PRODUCT:
                zero[own] = np.logical_or.reduce(zeros)
                constant[own] = zero[own] | np.logical_and.reduce(constants) if follows else zero[own]
            elif kind in (Kind.CHANNELWISE, Kind.GATE) and follows:
                constant[own] = np.logical_and.reduce(constants)
        return zero, constant

    def _pruned(self, node: fx.Node, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the labels that a mask reads it takes away, and in the place of which of these there are zeros."""
        site, placeholder = node.args[:2]
        layer = self.neurons.layers[int(str(placeholder).removeprefix("neuron_mask_"))]
        assert isinstance(site, fx.Node)
        units = np.arange(layer.size)
        if len(node.args) > 3:
            units = attrgetter(str(node.args[3].target))(self.neurons.graph).cpu().numpy()  # type: ignore[union-attr]
        made = self.channels.made(site)
        pruned = (units >= 0) & ~self.mask[layer.neurons][units]
        gone, zeroed = made[pruned], made[pruned & (self.fill[layer.neurons][units] == 0)]
        self.gone, self.left = np.union1d(self.gone, gone), np.union1d(self.left, np.setdiff1d(made, gone))
        return np.isin(labels, gone), np.isin(labels, zeroed)
