"""Channels cut out of a network: a smaller one of the same class that gives the same outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import CompactionError
from ..networks.adapting import deep_copy
from ..networks.preprocessing import own_module
from ..neurons.channel_origin import classes, is_depthwise
from ..neurons.channels import UNKNOWN, WEIGHTED, ZERO, Channels, Kind, module_of, operation
from ..neurons.finding import Neurons
from ..neurons.lowering import Lowered
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


@dataclass(frozen=True)
class _Piece:
    """What is cut out of one tensor: these places along an axis, which are of so many channels."""

    tensor: str
    axis: int
    places: tuple[int, ...]
    channels: int


def cut_channels(network: nn.Module, neurons: Neurons, mask: np.ndarray, images: Tensor) -> Cut:
    """A smaller network without the channels that the mask makes useless, with the same outputs.

    A channel can be cut where everything that reads it reads zeros: in a residual network, where all neurons that share
    a sum are pruned. The others are zeroed as in ``write_mask``. At least one channel a layer stays. Where the network's own code
    counts on a number of channels (``view(-1, 64)``) they stay as well, and ``stops`` names the layer.

    Args:
        network: the network that the neurons were found in.
        neurons: its neurons.
        mask: bool (neurons,), True where kept.
        images: float32 (n, C, H, W), to check that its outputs stay the same.

    Raises:
        CompactionError: the network cannot take the images.
    """
    masked = write_mask(network, neurons, mask).cpu().eval()
    images = images[:64].cpu()
    try:
        with torch.no_grad():
            expected = masked(images.clone())
    except Exception as error:  # the user's code, which can raise anything
        raise CompactionError(
            f"{type(own_module(network)).__name__} cannot take these images, to check a cut with: {error}"
        ) from error
    plan = _Plan(masked, neurons, mask)
    groups = plan.groups()
    if not groups and not mask.all() and not plan.stops():
        return Cut(masked, (_none_alone(neurons, mask),))
    compact, reason = _attempt(masked, [piece for group in groups.values() for piece in group], images, expected)
    if compact is not None:
        return Cut(compact, tuple(plan.stops()))
    stops: list[str] = plan.stops()
    accepted: list[_Piece] = []
    for name, group in groups.items():
        smaller, reason = _attempt(masked, [*accepted, *group], images[:3], expected[:3])
        if smaller is None:
            count = max(piece.channels for piece in group)
            stops.append(f"{count} pruned channels of {name} could not be cut out: {reason}")
        else:
            compact, accepted = smaller, [*accepted, *group]
    return Cut(masked if compact is None else compact, tuple(stops))


def _none_alone(neurons: Neurons, mask: np.ndarray) -> str:
    """Why nothing was cut where each pruned channel meets one that was kept."""
    names = [layer.name for layer in neurons.layers if not mask[layer.neurons].all()]
    few = f"{', '.join(names[:4])}{', ...' if names[4:] else ''}"
    return (
        f"no pruned channel could be cut out: those of {few} are added to channels that were kept, or multiply them as gates, so "
        'that they are needed there, as zeros; residual="group" prunes what is added together'
    )


def _attempt(
    network: nn.Module, pieces: list[_Piece], images: Tensor, expected: Tensor
) -> tuple[nn.Module | None, str]:
    """A copy without these pieces, or None and the reason why it would not answer as before."""
    smaller = deep_copy(network)
    path: list[str] = []
    handles = []
    for name, module in smaller.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
            handles.append(module.register_forward_hook(lambda *_: path.pop() and None))
    try:
        _remove(smaller, pieces)
        with torch.no_grad():
            found = smaller(images.clone())
    except Exception as error:  # the user's code, made for other numbers of channels
        where = f"layer {path[-1]}" if path else "the network's own forward"
        return None, f"{where} counts on their number ({(str(error) or type(error).__name__).splitlines()[0]})"
    finally:
        for handle in handles:
            handle.remove()
    bound = ROUNDING * expected.abs().max() + 1e-6
    if found.shape != expected.shape or not (found - expected).abs().max() <= bound:
        return None, "without them the network would answer differently"
    return smaller, ""


@torch.no_grad()
def _remove(network: nn.Module, pieces: list[_Piece]) -> None:
    places: dict[tuple[str, int], set[int]] = {}
    for piece in pieces:
        places.setdefault((piece.tensor, piece.axis), set()).update(piece.places)
    for (name, axis), gone in places.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = network.get_submodule(owner_name)
        tensor = getattr(owner, attribute)
        size = tensor.shape[axis]
        left = torch.tensor([place for place in range(size) if place not in gone], dtype=torch.int64)
        smaller = tensor.index_select(axis, left)
        setattr(
            owner,
            attribute,
            nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller,
        )
        for number in _SIZES[min(axis, 1)]:
            if getattr(owner, number, None) == size:
                setattr(owner, number, len(left))
        if axis == 0 and getattr(owner, "groups", 1) == size == getattr(owner, "in_channels", 0):  # depthwise
            for number in ("groups", "in_channels"):
                setattr(owner, number, len(left))


class _Plan:
    """Which channels nothing needs, and where they are in the tensors of the network."""

    def __init__(self, network: nn.Module, neurons: Neurons, mask: np.ndarray) -> None:
        self.network, self.neurons = network, neurons
        self.channels = Channels(neurons.graph)
        self.lowered: Mapping[str, Lowered] = neurons.graph.meta["lowered"]
        #: Labels that a mask takes away, and those of the same layers that it leaves.
        self.gone, self.left = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.zero = self._zeros(mask)
        self.classes = classes(self.channels, depthwise=True)
        self.needed = np.zeros(self.classes.max() + 1, dtype=bool)
        #: What needs a class of channels whatever they hold, and the first layer that reads what is not zero in it.
        self.held: dict[int, str] = {}
        self.read: dict[int, str] = {}
        #: Axes of tensors of the network that channels lie along, with their labels.
        self.along: list[tuple[str, int, np.ndarray]] = []
        for node in self.channels.nodes:
            self._look_at(node)
        for _, _, labels in self.along:  # a layer keeps one channel at least, and reads one
            if len(labels) and (labels > 0).all() and not self.needed[self.classes[labels]].any():
                self._need(labels[:1], held_by="a layer keeps one channel at least")

    def groups(self) -> dict[str, list[_Piece]]:
        """What to cut, by what must go together; each is named after its first layer."""
        top: dict[int, int] = {}

        def find(number: int) -> int:
            while top.setdefault(number, number) != number:
                number = top[number]
            return number

        pieces: list[tuple[_Piece, int]] = []
        for tensor, axis, labels in self.along:
            dead = (labels > 0) & ~self.needed[self.classes[np.maximum(labels, 0)]]
            if dead.any():
                numbers = np.unique(self.classes[labels[dead]]).tolist()
                for number in numbers[1:]:  # those of one layer go together
                    top[find(number)] = find(numbers[0])
                pieces.append((_Piece(tensor, axis, tuple(np.flatnonzero(dead).tolist()), len(numbers)), numbers[0]))
        groups: dict[int, list[_Piece]] = {}
        for piece, number in pieces:
            groups.setdefault(find(number), []).append(piece)
        return {group[0].tensor.rpartition(".")[0] or group[0].tensor: group for group in groups.values()}

    def _rows(self, node: fx.Node) -> np.ndarray:
        module = module_of(self.neurons.graph, node)
        return self.channels.vector(node, -1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1)

    def _need(self, labels: np.ndarray, *, held_by: str | None = None, read_by: str = "") -> None:
        numbers = np.unique(self.classes[labels[labels > 0]])
        self.needed[numbers] = True
        reasons, reason = (self.read, read_by) if held_by is None else (self.held, held_by)
        for number in numbers.tolist():
            reasons.setdefault(number, reason)

    def _need_all(self, node: fx.Node, by: fx.Node) -> None:
        labels = self.channels.labels[node]
        if labels is not None:
            known = self.lowered.get(str(by.target))
            where = by.meta.get("where") or "the network's own forward"
            what = f"{operation(by)} in {where}" if known is None else known.name
            self._need(np.unique(labels.thin.long().numpy()), held_by=f"{what} works on all of them together")

    def stops(self) -> list[str]:
        """Pruned channels that something needs although no neuron gives them anything, by layer, and what that is.

        Where neurons that were kept are added to them, nothing is said: there they are no longer the pruned ones' alone.
        """
        found: dict[tuple[str, str], int] = {}
        gone, left = (set(self.classes[labels].tolist()) for labels in (self.gone, self.left))
        for node in self.channels.nodes:
            if self.channels.kinds[node] is Kind.WEIGHTED:
                name = self.lowered[str(node.target)].name
                for number in self.classes[self._rows(node)].tolist():
                    if number in gone and number not in left and self.needed[number]:
                        why = self.held.get(number) or f"{self.read[number]} reads what is added to them"
                        found[name, why] = found.get((name, why), 0) + 1
        return [
            f"{count} pruned channels of {name} could not be cut out: {why}" for (name, why), count in found.items()
        ]

    def _look_at(self, node: fx.Node) -> None:
        """Find out what the node needs of what it reads."""
        channels, kind = self.channels, self.channels.kinds[node]
        inputs = channels.inputs(node)
        if kind in (Kind.WEIGHTED, Kind.NORM):
            self._look_at_layer(node, inputs[0])
        elif kind is Kind.CONSTANT:
            return
        elif kind in (Kind.LIVE_NORM, Kind.MIXING, Kind.OPAQUE) or channels.labels[node] is None:
            for one in (node, *inputs):  # all of them count there, if only for the statistics
                if one.op != "output":
                    self._need_all(one, node)
        elif operation(node) == "scaled_dot_product_attention":
            for one in inputs[:2]:
                self._need_all(one, node)
        else:
            for one in inputs:
                if channels.labels[one] is None:
                    self._need_all(node, node)
            self._look_beside(node)

    def _look_at_layer(self, node: fx.Node, source: fx.Node) -> None:
        channels, module = self.channels, module_of(self.neurons.graph, node)
        known = self.lowered[str(node.target)]
        rows = self._rows(node)
        read = channels.vector(source, -1 if isinstance(module, nn.Linear) else 1)
        steady = channels.labels[source] is None or (read != UNKNOWN).any()
        grouped = getattr(module, "groups", 1) > 1
        calls = sum(
            str(one.target) in self.lowered and self.lowered[str(one.target)].weight == known.weight
            for one in channels.nodes
        )
        if not steady:
            self._need_all(source, node)
        if calls > 1 or (grouped and not (is_depthwise(channels, node) and (read > 0).all())):
            # Other uses would have to change too, or groups would differ in size.
            why = f"{known.name} {'is used several times' if calls > 1 else 'is a convolution in groups'}"
            self._need(rows, held_by=why)
            self._need(read, held_by=why)
        elif isinstance(module, WEIGHTED) and not grouped:
            self._need(read[~self.zero[np.maximum(read, 0)]], read_by=known.name)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and (read == UNKNOWN).any():
            self._need(rows, held_by=f"what {known.name} reads could not be followed")
        if calls > 1:
            return
        for name in known.tensors:
            shape = attrgetter(name)(self.network).shape
            if shape and shape[0] == len(rows):
                self.along.append((name, 0, rows))
            if len(shape) > 1 and isinstance(module, WEIGHTED) and shape[1] == len(read):
                self.along.append((name, 1, read))

    def _look_beside(self, node: fx.Node) -> None:
        """Parameters that an operation reads beside channels, one for each of them."""
        labels = self.channels.labels[node]
        assert labels is not None
        varying = [axis for axis, size in enumerate(labels.thin.shape) if size > 1]
        for source in node.all_input_nodes:
            shape = source.meta.get("shape")
            if source.op != "get_attr" or not shape or max(shape) == 1 or self.channels.kinds[node] is Kind.MASK:
                continue
            if operation(node) == "prelu":
                axis, place = 1, 0
            else:
                behind = len(labels.shape) - varying[0] if varying else 0
                axis, place = (varying[0] if varying else 0), len(shape) - behind
            if place >= len(shape) or place < 0 or shape[place] == 1:
                continue
            along = labels.along(axis)
            parameter = source.meta["parameter"]
            if len(varying) != 1 or len(along) != shape[place] or parameter is None:
                self._need_all(node, node)
            else:
                self.along.append((parameter, place, along))

    def _zeros(self, mask: np.ndarray) -> np.ndarray:
        """Of each label, whether it is of zeros whatever the image, bool (labels,)."""
        channels = self.channels
        zero = np.zeros(channels.count, dtype=bool)
        zero[ZERO] = True
        for block in channels.blocks:
            kind = channels.kinds[block.node]
            own = slice(block.start, block.start + block.size)
            read = [np.where(parents == UNKNOWN, False, zero[np.maximum(parents, 0)]) for parents in block.parents]
            if kind is Kind.MASK:
                zero[own] = read[0] | self._pruned(block.node, block.parents[0], mask)
            elif kind is Kind.SUM:
                zero[own] = np.logical_and.reduce(read)
            elif kind is Kind.PRODUCT:
                zero[own] = np.logical_or.reduce(read)
        return zero

    def _pruned(self, node: fx.Node, labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Which of the labels that a mask reads it takes away."""
        site, placeholder = node.args[:2]
        layer = self.neurons.layers[int(str(placeholder).removeprefix("neuron_mask_"))]
        assert isinstance(site, fx.Node)
        units = np.arange(layer.size)
        if len(node.args) > 3:
            units = attrgetter(str(node.args[3].target))(self.neurons.graph).cpu().numpy()  # type: ignore[union-attr]
        rows = self._rows(site)
        pruned = ~mask[layer.neurons]
        gone = rows[(units >= 0) & pruned[np.maximum(units, 0)]]
        self.gone, self.left = np.union1d(self.gone, gone), np.union1d(self.left, np.setdiff1d(rows, gone))
        return np.isin(labels, gone)
