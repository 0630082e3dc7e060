"""What became of each layer with weights, and of each parameter beside them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import fx, nn

from .channels import Kind, module_of
from .layers import Account
from .operations import operation
from .products import products, size_of
from .sites import Sites

_IS_OUTPUT = "the logits come from it"


def accounts(sites: Sites) -> tuple[Account, ...]:
    """An account of every layer with weights and of all other parameters of two axes or more."""
    told: dict[tuple[str, bool], Account] = {}
    claimed: set[str] = set()
    for part in (_of_layers(sites), _of_products(sites)):
        _add(told, claimed, part)
    _add(told, claimed, _of_others(sites, claimed))
    return tuple(told.values())


def why_none(told: Iterable[Account]) -> str:
    """Why a network with these accounts has no neuron."""
    inner = [f"{account.name} ({account.reason})" for account in told if account.channels and not account.is_output]
    if inner:
        return f"of its layers none can be pruned: {'; '.join(inner[:3])}"
    last = [account.name for account in told if account.is_output]
    if len(last) > 1:
        return f"the only layers that make channels, {', '.join(last[:-1])} and {last[-1]}, give the logits"
    if last:
        return f"the only layer that makes channels, {last[0]}, gives the logits"
    return "it computes its logits without any convolution or linear layer whose weights are parameters"


def notes(sites: Sites) -> list[str]:
    """Batch normalisations that no neuron is masked at, and layers that no pass reads, a sentence each."""
    channels, meta = sites.channels, sites.channels.graph_module.meta
    sentences = []
    for node in channels.nodes:
        module = module_of(channels.graph_module, node)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and node not in sites.at:
            if module.weight is None:
                why = "it has no weight (affine=False), so what it reads is pruned before it"
            else:
                why = sites.reasons.get(node) or "it reads no layer that has neurons"
            sentences.append(f"The batch normalisation {sites.name(node)} has no neurons: {why}.")
        if meta["live"] and operation(node) == "batch_norm":
            read = [name for source in node.all_input_nodes for name in source.meta.get("read", ())]
            name = sites.shown(read[0].rpartition(".")[0] if read else node.meta["where"])
            sentences.append(
                f"The batch normalisation {name or 'that the network calls'} takes the statistics of the batch (it has no running "
                "statistics, or its call has training=True), so that answers depend on the other images of a batch; masks are "
                "right for whole batches alone."
            )
    unused = [sites.shown(name).removesuffix(".weight") for name in _unused(sites)]
    if unused:
        sentences.append(
            f"No recorded pass reads the weights of {', '.join(unused[:5])}{', ...' if unused[5:] else ''}."
        )
    return sentences


def _add(told: dict[tuple[str, bool], Account], claimed: set[str], more: Iterable[Account]) -> None:
    """Add accounts, those of one name as one; a parameter stays with the first account that has it."""
    for account in more:
        key = (account.name, account.is_output)
        before = told.get(key, replace(account, channels=0, units=0, parameters=()))
        told[key] = replace(
            before,
            channels=before.channels + account.channels,
            units=before.units + account.units,
            reason=before.reason or account.reason,
            parameters=(*before.parameters, *(name for name in account.parameters if name not in claimed)),
        )
        claimed.update(account.parameters)


def _of_layers(sites: Sites) -> Iterable[Account]:
    """Of convolutions and linear layers; of several uses of one layer that with the fewest neurons."""
    channels = sites.channels
    by_layer: dict[Any, Account] = {}
    for node in channels.nodes:
        if channels.kinds[node] is Kind.WEIGHTED:
            layer, account = channels.lowered[str(node.target)], _of_layer(sites, node)
            key = layer.weight or node.target
            if key not in by_layer or account.units < by_layer[key].units:
                by_layer[key] = replace(account, parameters=_large(sites, layer.tensors))
    return by_layer.values()


def _of_layer(sites: Sites, node: fx.Node) -> Account:
    name, size = sites.name(node), sites.channels.size(node)
    if node in sites.last:
        return Account(name, size, 0, True, _IS_OUTPUT)
    if node in sites.at:
        count = int((sites.at[node].units >= 0).sum())
        return Account(name, size, count, reason=None if count == size else "some of its channels are of no head")
    if sites.normalised_by.get(node) in sites.at:
        return Account(name, size, size)
    return Account(name, size, 0, reason=sites.reasons.get(node) or "its channels could not be followed")


def _of_products(sites: Sites) -> Iterator[Account]:
    """Of other operations with weights: by parameters, and the output by whatever it is."""
    seen = set()
    for node, weights in products(sites.channels).items():
        is_output = node in sites.last
        reason = f"its weights are used by {operation(node)}, in which no neurons are looked for"
        reason = _IS_OUTPUT if is_output else reason
        own = f"{sites.shown(node.meta['where'])}.{operation(node)}".removeprefix(".")
        if is_output and not weights:
            yield Account(own, node.meta["shape"][-1], 0, is_output, reason)
        for source in weights:
            read, large = source.meta["read"], _large(sites, source.meta["read"])
            key = source.meta["parameter"] or source  # used twice it makes no more channels
            if (large or is_output) and key not in seen:
                seen.add(key)
                name = _layer_of((large or [sites.shown(name) for name in read] or [own])[0])
                yield Account(name, size_of(sites.channels, node, source), 0, is_output, reason, large)


def _of_others(sites: Sites, claimed: set[str]) -> Iterator[Account]:
    """Of parameters that make no channels: scales and shifts of whole maps, tokens, embeddings of positions, unused ones."""
    channels = sites.channels
    for node in channels.nodes:
        layer = channels.layer(node)
        if layer is not None:
            name, reason = sites.name(node), "it normalises what other layers make"
            names = _large(sites, layer.tensors)
        elif node.op == "get_attr":
            reader = node
            while channels.kinds[reader] is Kind.CONSTANT:
                reader = next(iter(reader.users))
            reason = (
                f"{operation(reader) or reader.name} takes it beside what layers make; it makes no channels of its own"
            )
            name, names = "", _large(sites, node.meta["read"])
        else:
            continue
        for parameter in names:
            if parameter not in claimed:
                yield Account(name or _layer_of(parameter), 0, 0, reason=reason, parameters=(parameter,))
    for parameter in _large(sites, _unused(sites)):
        yield Account(_layer_of(parameter), 0, 0, reason="no recorded pass reads it", parameters=(parameter,))


def _unused(sites: Sites) -> list[str]:
    """Parameters of two axes or more that no node of the graph reads."""
    channels = sites.channels
    read = {name for layer in channels.lowered.values() for name in layer.tensors}
    read.update(name for node in channels.nodes if node.op == "get_attr" for name in node.meta["read"])
    return [name for name, rank in channels.graph_module.meta["parameters"].items() if rank > 1 and name not in read]


def _large(sites: Sites, names: Iterable[str]) -> tuple[str, ...]:
    """Those that are parameters of two axes or more, as the user calls them."""
    ranks = sites.channels.graph_module.meta["parameters"]
    return tuple(sites.shown(name) for name in names if ranks.get(name, 0) > 1)


def _layer_of(parameter: str) -> str:
    return parameter.removesuffix(".weight")
