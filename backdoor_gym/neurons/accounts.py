"""What became of each layer with weights."""

from torch import fx, nn

from .channels import Kind, module_of
from .layers import Account
from .operations import PRODUCTS_OF_MATRICES, operation
from .sites import Sites

#: Products of matrices in which a parameter's columns are channels.
_BY_COLUMNS = ("matmul", "mm", "einsum", "bmm")


def accounts(sites: Sites) -> tuple[Account, ...]:
    """An account of every layer with weights; of several uses that of the one with the fewest neurons."""
    channels = sites.channels
    by_layer: dict[str, Account] = {}
    for node in channels.nodes:
        own = {str(node.target): _account(sites, node)} if channels.kinds[node] is Kind.WEIGHTED else {}
        reason = f"its weights are used by {operation(node)}, in which no neurons are looked for"
        others = {name: Account(name, size, 0, reason=reason) for name, size in _other_weights(sites, node).items()}
        for key, account in (own | others).items():
            if key not in by_layer or account.units < by_layer[key].units:
                by_layer[key] = account
    return tuple(by_layer.values())


def notes(sites: Sites) -> list[str]:
    """Batch normalisations that no neuron is masked at, and layers that no pass uses, a sentence each."""
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
    if meta["live"]:
        sentences.append(
            "A batch normalisation without running statistics makes answers depend on the other images of a batch; masks are "
            "right for whole batches alone."
        )
    read = {name for layer in channels.lowered.values() for name in layer.tensors}
    read.update(name for node in channels.nodes if node.op == "get_attr" for name in node.meta["read"])
    weights = [name for name, rank in meta["parameters"].items() if rank > 1 and name not in read]
    unused = [name.removesuffix(".weight") for name in weights]
    if unused:
        sentences.append(f"No pass uses the weights of {', '.join(unused[:5])}{', ...' if unused[5:] else ''}.")
    return sentences


def _account(sites: Sites, node: fx.Node) -> Account:
    """Of a convolution or linear layer."""
    name, size = sites.name(node), sites.channels.size(node)
    if node in sites.last:
        return Account(name, size, 0, True, "the logits come from it")
    if node in sites.at:
        count = int((sites.at[node].units >= 0).sum())
        return Account(name, size, count, reason=None if count == size else "some of its channels are of no head")
    if sites.normalised_by.get(node) in sites.at:
        return Account(name, size, size)
    return Account(name, size, 0, reason=sites.reasons.get(node) or "its channels could not be followed")


def _other_weights(sites: Sites, node: fx.Node) -> dict[str, int]:
    """Parameters that an operation multiplies by, those of convolutions and linear layers left out, and their channels."""
    channels, meta = sites.channels, sites.channels.graph_module.meta
    constants = [source for source in node.all_input_nodes if source.op == "get_attr"]
    if channels.kinds[node] is Kind.OPAQUE:
        front = constants or list(node.all_input_nodes[1:])  # weights may be computed from the images
    else:
        front = constants if operation(node) in PRODUCTS_OF_MATRICES else []
    weights: dict[str, int] = {}
    seen: set[fx.Node] = set()
    while front:
        source = front.pop()
        if source in seen or channels.kinds[source] in (Kind.WEIGHTED, Kind.IMAGES):
            continue
        seen.add(source)
        for name in source.meta.get("read", ()):
            shape = source.meta["shape"]
            if name in meta["parameters"] and len(shape) > 1:
                weights[sites.shown(name).removesuffix(".weight")] = shape[-1 if operation(node) in _BY_COLUMNS else 0]
        front.extend(source.all_input_nodes)
    return weights
