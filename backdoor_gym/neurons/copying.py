"""Copies of a network whose weights are plain parameters, so that zeros written into them stay."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from ..networks.adapting import deep_copy

#: Hooks of torch.nn.utils that compute a weight before each pass, by their class's name, and what takes them away.
_OLD_NORMS = {"WeightNorm": remove_weight_norm, "SpectralNorm": remove_spectral_norm}


@torch.no_grad()
def plain_copy(network: nn.Module) -> nn.Module:
    """A copy; weights that are computed from others (weight and spectral norm) are plain ones of that value.

    The state dict of the copy has ``weight`` where the network's has ``weight_g``, ``parametrizations.weight.original0``, ...
    """
    for module, name, _ in _old_norms(network):  # what the last pass computed may hang on its graph, which no copy can
        value = module.__dict__.get(name)
        if isinstance(value, Tensor):
            module.__dict__[name] = value.detach()
    copied = deep_copy(network)
    for module, name, kind in list(_old_norms(copied)):
        _OLD_NORMS[kind](module, name)
        # torch leaves this one, and it asks for the tensors of the norm.
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if type(getattr(hook, "hook", hook)).__name__ == "SpectralNormLoadStateDictPreHook":
                del module._load_state_dict_pre_hooks[key]
    for module in list(copied.modules()):
        if parametrize.is_parametrized(module):
            made = type(module)  # for the original, which would lose its weight with the copy
            module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return copied


def computed_weights(network: nn.Module) -> list[str]:
    """Names of the layers whose weights ``plain_copy`` makes plain."""
    old = {module for module, _, _ in _old_norms(network)}
    return [name for name, module in network.named_modules() if module in old or parametrize.is_parametrized(module)]


def taking_norms_off(network: nn.Module) -> str:
    """Python that makes the weights of another ``network`` of this kind plain, as those of the copy are; "" where all are."""
    taken: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        for _, tensor, kind in _old_norms(module, below=False):
            call = f"torch.nn.utils.{_OLD_NORMS[kind].__name__}(layer, {tensor!r})"
            if kind == "SpectralNorm":
                call += "\n    layer._load_state_dict_pre_hooks.clear()  # of the norm"
            taken.setdefault(call, []).append(name)
        if parametrize.is_parametrized(module):
            for tensor in module.parametrizations:
                call = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
                taken.setdefault(call, []).append(name)
    return "".join(f"for layer in map(network.get_submodule, {names}):\n    {call}\n" for call, names in taken.items())


def _old_norms(network: nn.Module, below: bool = True) -> list[tuple[nn.Module, str, str]]:
    """Modules with such a hook, the name of the weight, and the hook's class."""
    return [
        (module, hook.name, type(hook).__name__)
        for module in (network.modules() if below else [network])
        for hook in module._forward_pre_hooks.values()
        if type(hook).__name__ in _OLD_NORMS and hasattr(hook, "name")
    ]
