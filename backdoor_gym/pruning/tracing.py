"""A network as a torch.fx graph without in-place operations, in which every layer with neurons is one node."""

import copy
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ..errors import UntraceableError
from ..zoo.preprocessing import Preprocess

#: Layers that stay one node, those that are derived from them and answer a mask as they do among them.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

#: Functions whose second argument says whether they work in place.
_INPLACE_SECOND = {F.relu, F.relu6, F.selu, F.silu, F.mish, F.hardswish, F.hardsigmoid}

#: torch.fx patches ``nn.Module`` of the whole process while it traces.
_TRACING = Lock()


def trace(network: nn.Module, images: Tensor | None = None) -> fx.GraphModule:
    """A traced copy of the network in eval mode, without in-place operations.

    Args:
        network: it is left as it is.
        images: some that it takes, float32 (n, C, H, W); needed where its forward branches on the shapes of tensors, and
            the graph is then right for images of that size.

    Raises:
        UntraceableError: the network cannot be traced; the message names the layer.
    """
    _refuse_computed_weights(network)
    network = copy.deepcopy(network).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    tracer = _Tracer(None if images is None else images[:2].clone())
    try:
        with _TRACING:
            graph = tracer.trace(network, concrete_args=_defaults(network))
    except Exception as error:  # tracing runs the user's code, which can raise anything on symbolic values
        where = f"layer {tracer.path[-1]}" if tracer.path else "the network's own forward"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UntraceableError(
            f"torch.fx cannot trace {where} ({reason}); its forward must not branch or loop on the values of tensors"
            f"{', nor on their shapes where no images are given to trace with' if images is None else ''}: move such code "
            "out of the network"
        ) from error
    graph_module = fx.GraphModule(network, graph)
    _without_inplace(graph_module)
    # Assertions, tracing's own among them, and what only they read.
    for node in reversed(list(graph_module.graph.nodes)):
        if node.target is torch._assert or (node.op in ("call_function", "get_attr") and not node.users):
            graph_module.graph.erase_node(node)
    if images is not None:
        _check_number(graph_module, images)
    return graph_module


@torch.no_grad()
def _check_number(graph_module: fx.GraphModule, images: Tensor) -> None:
    """What was decided by the two images that were traced with must be right for any number of them."""
    try:
        right = len(graph_module(images[:1].clone())) == 1
    except Exception:  # the user's code
        right = False
    if not right:
        raise UntraceableError(
            "the network's forward depends on how many images it is given; it must treat each on its own"
        )


def is_number(node: fx.Node) -> bool:
    """Whether the node computes shapes, or something from shapes alone, rather than values of tensors."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    return (
        node.op in ("call_function", "call_method")
        and bool(node.all_input_nodes)
        and all(is_number(source) for source in node.all_input_nodes)
    )


class _Tracer(fx.Tracer):
    """Names the module whose forward fails, decides by shapes, and lets other threads go on as they would."""

    def __init__(self, images: Tensor | None) -> None:
        super().__init__()
        self.path: list[str] = []
        self._thread = get_ident()
        self._images = images
        self._values: dict[fx.Node, Any] = {}
        self._evaluating = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Preprocess) or super().is_leaf_module(m, module_qualified_name):
            return True
        if not isinstance(m, LAYERS) or list(m.children()):
            return False
        with self._untraced():
            return _answers_a_mask(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self._thread or self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if get_ident() != self._thread or self._evaluating:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth of what depends on shapes alone, as it is for the images given; refused for anything else."""
        if self._images is None or not is_number(obj.node):
            return super().to_bool(obj)
        with self._untraced():
            return bool(self._value(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator:
        """The parts of what is taken apart, as many as there are for the images given."""
        if self._images is None:
            return super().iter(obj)
        with self._untraced():
            count = len(self._value(obj.node))
        return iter([operator.getitem(obj, index) for index in range(count)])

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Modules that are called here compute."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    @torch.no_grad()
    def _value(self, wanted: fx.Node) -> Any:
        """What the graph so far gives for the images."""
        for node in self.graph.nodes:
            if node in self._values:
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
            if node.op == "placeholder":
                value = self._images if not self._values else (node.args[0] if node.args else None)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.root)
            elif node.op == "call_module":
                value = self.root.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                value = node.target(*args, **kwargs)
            self._values[node] = value
        return self._values[wanted]


@torch.no_grad()
def _answers_a_mask(module: nn.Module) -> bool:
    """Whether zeros in the weight and the bias of one output channel make that channel zero and leave the others.

    A layer with a forward of its own may do anything with its weights; it is tried on one random input.
    """
    module = copy.deepcopy(module).eval().double()
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        side = 8 + 2 * max(module.kernel_size)
        shape, axis = (2, module.in_channels, *[side] * len(module.kernel_size)), 1
    elif isinstance(module, nn.Linear):
        shape, axis = (2, module.in_features), 1
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        shape, axis = (2, module.normalized_shape[0], 3, 5), 1
    else:
        count = getattr(module, "num_features", getattr(module, "num_channels", 0))
        shape, axis = ((2, count, 5) if isinstance(module, nn.BatchNorm1d) else (2, count, 5, 5)), 1
    if not isinstance(module.weight, Tensor) or len(module.weight) < 2:
        return False
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    try:
        whole = module(inputs.clone())
        for parameter in (module.weight, module.bias):
            if isinstance(parameter, Tensor):
                parameter[0] = 0
        masked = module(inputs.clone())
    except Exception:  # the user's code, on an input that it may not have been made for
        return False
    if not isinstance(whole, Tensor) or whole.ndim <= axis or whole.shape[axis] != len(module.weight):
        return False
    return bool((masked.select(axis, 0) == 0).all()) and torch.allclose(whole[:, 1:], masked[:, 1:])


def _refuse_computed_weights(network: nn.Module) -> None:
    """Zeros written into a weight that is computed from other parameters would be lost."""
    for name, module in network.named_modules():
        hooks = module._forward_pre_hooks.values()
        if is_parametrized(module) or any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in hooks):
            raise UntraceableError(
                f"the weights of layer {name} are computed from others (weight or spectral normalisation); make them "
                "plain first (torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm)"
            )


def _defaults(network: nn.Module) -> dict[str, Any]:
    """The defaults of all arguments of ``forward`` but the first: it is traced as it is called with images alone."""
    arguments = list(inspect.signature(network.forward).parameters.values())[1:]
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def _without_inplace(graph_module: fx.GraphModule) -> None:
    """Replace in-place operations, which would overwrite activations that are kept, and ``view``, which needs one layout.

    What reads the overwritten value later reads the result instead, also where the code drops the returned value.
    """
    plain = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, F.relu_: F.relu}
    modules = {name: module for name, module in graph_module.named_modules() if getattr(module, "inplace", False)}
    for module in modules.values():
        module.inplace = False
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    for node in order:
        in_place = node.op == "call_module" and node.target in modules
        if node.op == "call_function":
            by_position = node.target in _INPLACE_SECOND and len(node.args) > 1
            in_place = node.target in plain or bool(node.kwargs.get("inplace")) or (by_position and bool(node.args[1]))
            node.target = plain.get(node.target, node.target)
            node.args = node.args[:1] if by_position else node.args
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        elif node.op == "call_method" and isinstance(node.target, str):
            if node.target.endswith("_") and hasattr(Tensor, node.target[:-1]):
                in_place, node.target = True, node.target[:-1]
            if node.target == "view":
                node.target = "reshape"
        if in_place and isinstance(node.args[0], fx.Node):
            overwritten = node.args[0]
            for reader in list(overwritten.users):
                if order[reader] > order[node]:
                    reader.replace_input_with(overwritten, node)
