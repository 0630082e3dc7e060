"""A network as a torch.fx graph without in-place operations, in which every layer with neurons is one module."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import DataError, UntraceableError
from ..networks.adapting import find_logits, pick_logits
from ..networks.preprocessing import own_module, own_name
from ..wording import first_line
from .copying import plain_copy
from .joining import Joiner
from .precision import CASTS, REDUCED, InFloat32
from .recording import Recorder, Tape, Value, in_words, leaves, named_tensors

#: Sides of images that are tried where none are given: usual ones, then all small ones.
USUAL_SIDES = (32, 28, 224, 64, 96, 128, 8, 16, 299, 256, 112, 160, 192, 240, 288, 300, 320, 384, 448, 512)
SIDES = (*USUAL_SIDES, *(side for side in range(1, 80) if side not in USUAL_SIDES))
#: Largest difference of logits, over the largest of them, that rounding may make.
ROUNDING = 1e-3


def trace(network: nn.Module, images: Tensor | None = None) -> fx.GraphModule:
    """A traced copy of the network in eval mode and float32, on the CPU, without in-place operations.

    ::

        images -> conv1 (nn.Conv2d) -> relu -> fc (nn.Linear) -> output      nodes, all layers plain modules
        meta["lowered"]     {"conv1": Lowered("conv1", ...), ...}            where each layer comes from
        meta["parameters"]  {"conv1.weight": 4, ...}                         the network's, with their numbers of axes
        meta["saved"]       {"conv1.weight", ...}                            names in its state dict
        meta["live"]        whether a batch normalisation takes the statistics of the batch
        meta["computes_in"] ["bfloat16"]   types that the network itself computes in, where the graph takes float32

        node.meta["shape"]  of its value for two images      node.meta["where"]      the module that called it
        node.meta["read"]   of a constant: the parameters    node.meta["parameter"]  of a constant: the one that it is
                            that it is computed from         node.meta["number"]     whether it counts images

    Args:
        network: it is left as it is.
        images: some that it takes, float32 (n, C, H, W). The graph is right for images of that size. Without any, images of
            usual sizes are tried.

    Raises:
        UntraceableError: the network cannot be traced; the message names the layer.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UntraceableError(
                f"{f'layer {name}' if name else 'the network'} is TorchScript, which does not show its layers; give the Python "
                "module that it was made from, and load its state dict"
            )
        if type(module).__module__.startswith("torch.") and ".quantized." in type(module).__module__:
            raise UntraceableError(
                f"{in_words(own_name(network, name))} is quantised, and holds no weights that zeros can be written into; give the "
                "network of floats that it was made from"
            )
    if any(nn.parameter.is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise UntraceableError(
            "the network has lazy layers that were never called; call it once with some images before"
        )
    unwritable = next((name for name in named_tensors(network) if name != name.encode(errors="replace").decode()), None)
    if unwritable is not None:
        raise UntraceableError(
            f"no file can hold the name {unwritable!r}, which is no UTF-8: name that layer otherwise"
        )
    copied = plain_copy(network).eval().float().cpu()
    known = named_tensors(copied).keys()
    own = {own_name(network, name): tensor for name, tensor in named_tensors(network).items()}
    others = {value.dtype for value in own.values() if value.dtype in CASTS}
    in_float32 = InFloat32(REDUCED | others)
    three = _three(_guess(copied, in_float32) if images is None else images)
    try:
        with torch.no_grad(), in_float32:
            expected = copied(three.clone())  # also fills what the network keeps for later
            entry = None if isinstance(expected, Tensor) else find_logits(expected)
            expected = expected if entry is None else pick_logits(expected, entry)
    except DataError as error:
        raise UntraceableError(str(error)) from error
    except Exception as error:  # the user's code, which can raise anything
        raise _cannot_take(type(own_module(network)).__name__, three, error) from error
    made = [name for name in named_tensors(copied) if name not in known]
    if made:
        raise UntraceableError(
            f"the network makes {made[0]} when it is first called; call it once with some images before"
        )
    try:
        tapes = [_record(copied, images, entry, in_float32) for images in (three[:2], three)]
        _check_copied(tapes[0], own)
        graph_module = Joiner(copied, *tapes).join()
        computes_in = sorted(str(kind).removeprefix("torch.") for kind in in_float32.met)
        graph_module.meta.update(saved=set(copied.state_dict()), computes_in=computes_in)
        _check(graph_module, expected, three)
    except UntraceableError as error:
        if _is_random(copied, three, expected, in_float32):
            raise UntraceableError(
                "the network gives other answers each time to the same images; take what is random out of its forward, or keep "
                "it to training"
            ) from error
        raise
    return graph_module


def same_logits(logits: Any, expected: Tensor, rounding: float) -> bool:
    """Whether logits differ by rounding alone: by so much of the largest of them."""
    bound = rounding * expected.abs().max() + 1e-6
    return (
        isinstance(logits, Tensor) and logits.shape == expected.shape and bool((logits - expected).abs().max() <= bound)
    )


@torch.no_grad()
def _is_random(network: nn.Module, images: Tensor, expected: Any, in_float32: InFloat32) -> bool:
    with in_float32:
        again = network(images.clone())
    return isinstance(again, Tensor) and isinstance(expected, Tensor) and not torch.equal(again, expected)


def _three(images: Tensor) -> Tensor:
    """Three different images."""
    three = torch.cat([images[:3].detach().cpu().float()] * 3)[:3]
    return three * torch.tensor([1, 0.9, 0.8]).view(-1, *[1] * (three.ndim - 1))


def _check_copied(tape: Tape, tensors: Mapping[str, Tensor]) -> None:
    """A record of a copy must not read the tensors of the network that it is a copy of."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    for call in tape.calls:
        for value in leaves((call.args, call.kwargs)):
            if isinstance(value, Value) and id(value.tensor) in names:
                raise UntraceableError(
                    f"a function holds {names[id(value.tensor)]} itself, so that copies of the network run with the weights of the "
                    "first: put in the place of a forward (old = n.forward; n.forward = lambda x: 2 * old(x)), or a hook; write a "
                    "class with that forward, which reaches its layers through self"
                )


def _record(network: nn.Module, images: Tensor, entry: str | int | None, in_float32: InFloat32) -> Tape:
    images = images.clone()
    recorder = Recorder(network, images)
    try:
        return recorder.run(network, images, entry, in_float32)
    except UntraceableError:
        raise
    except Exception as error:  # the user's code, which can raise anything
        raise _cannot_take(recorder.where, images, error) from error


def _cannot_take(what: str, images: Tensor, error: Exception) -> UntraceableError:
    return UntraceableError(
        f"{what} cannot take {len(images)} images of shape {tuple(images.shape[1:])} ({first_line(error)}); are these the "
        "images that it was made for (clean=, --image-size)?"
    )


def _guess(network: nn.Module, in_float32: InFloat32) -> Tensor:
    """Images that the network takes: of as many channels as its first layer reads, of the first size that works."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)), None)
    counts = (first.in_channels, 3, 1) if isinstance(first, nn.Conv2d) else (3, 1)
    generator = torch.Generator().manual_seed(0)
    for channels in dict.fromkeys(counts):
        for side in SIDES:
            images = torch.rand(2, channels, side, side, generator=generator)
            with (
                torch.no_grad(),
                in_float32,
                suppress(Exception),
            ):  # of another size; the user's code can raise anything
                answer = network(images.clone())
                if not isinstance(answer, Tensor) or len(answer) == len(images):  # not where positions became images
                    return images
    raise UntraceableError(
        f"{type(own_module(network)).__name__} takes no images of a usual size; show it some: clean=(images, labels), or --clean "
        "and --image-size on the command line"
    )


@torch.no_grad()
def _check(graph_module: fx.GraphModule, expected: Any, images: Tensor) -> None:
    """The graph must answer as the network does, in another order in memory and for a single image too."""
    wrong = "the record of its forward does not give the same logits"
    try:
        logits = graph_module(images.contiguous(memory_format=torch.channels_last))
        alone = logits[:1] if graph_module.meta["live"] else graph_module(images[:1].clone())
    except Exception as error:  # the user's operations
        raise UntraceableError(
            f"the network's forward cannot be run again from its record ({first_line(error)}); it must treat each image on its "
            "own, and work on no tensor through the memory of another"
        ) from error
    if not same_logits(logits, expected, ROUNDING):
        raise UntraceableError(
            f"{wrong}: it must give the same each time, and write into no tensor that others look at"
        )
    if alone.shape != expected[:1].shape or not same_logits(torch.cat([alone, expected[1:]]), expected, ROUNDING):
        raise UntraceableError(f"{wrong} for a single image: it depends on how many images it is given")
