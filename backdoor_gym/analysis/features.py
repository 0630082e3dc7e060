"""Static features of each neuron, standardised within its layer, from the weights and the defender's clean images.

| column | before standardisation |
|---|---|
| ``uclc`` | upper bound of the channel Lipschitz constant (``uclc.py``) |
| ``kl`` | log(1 + KL divergence of the clean images' normal distribution of BN inputs from the BN's running one) |
| ``log_variance_ratio`` | log of clean over running variance of the BN input |
| ``mean_shift`` | absolute difference of clean and running mean, in running standard deviations |
| ``activation`` | mean of the positive part of the neuron's output on clean images |
| ``weight`` | gamma of the normalisation |
| ``bias`` | beta of the normalisation |
| ``saliency`` | absolute derivative of the clean cross-entropy with respect to the neuron's mask |
| ``pull`` | derivative of the suspected target's margin by the mask under the inverted trigger (``trigger_inversion.py``) |
| ``depth`` | index of the layer over that of the last, in [0, 1], not standardised |

Standardised is (x - mean) / unbiased standard deviation over the layer; zero where that deviation is zero or the layer
has one neuron. All but ``uclc`` are clamped to +-6. ``uclc`` is not, so that a threshold on it is the published CLP; a
score of n values is at most (n - 1) / sqrt(n) by itself. In mean and variance on clean images all classes weigh alike.
What is not there is zero: running statistics are of a batch normalisation alone, gamma and beta of any normalisation.
"""

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..masking.sizes import Sizes
from ..metrics import require_finite, target_margin
from ..neurons.channels import WEIGHTED
from ..neurons.layers import Neurons
from .batch_norms import by_image, class_weights
from .mask_gradient import mask_gradient
from .trigger_inversion import InvertedTrigger
from .uclc import uclc

STATIC_FEATURES = (
    "uclc",
    "kl",
    "log_variance_ratio",
    "mean_shift",
    "activation",
    "weight",
    "bias",
    "saliency",
    "pull",
    "depth",
)
CLAMP = 6.0
#: Most images in one forward and backward pass, which keeps every activation.
BATCH = 100


def standardise(values: Tensor) -> Tensor:
    """(values - mean) / unbiased standard deviation, zeros where all are alike; float64 (n,)."""
    if len(values) < 2:
        return torch.zeros_like(values)
    deviation = values.std()
    # Deviations at the level of rounding are those of a constant.
    if not deviation > 1e-12 * values.abs().max():
        return torch.zeros_like(values)
    return (values - values.mean()) / deviation


def neuron_features(
    network: nn.Module, neurons: Neurons, images: Tensor, labels: Tensor, inverted: InvertedTrigger | None
) -> np.ndarray:
    """Features of each neuron, float32 (neurons, len(STATIC_FEATURES)), always finite.

    Args:
        network: the network that the neurons were found in, or its traced copy ``neurons.graph``.
        neurons: its neurons.
        images: the defender's clean images, float32 (n, C, H, W) in [0, 1].
        labels: int64 (n,).
        inverted: the inverted trigger, None where there is none (``pull`` is zero then).
    """
    bounds = uclc(network, neurons)
    observed = observe(neurons, images, labels)
    pulls = None if inverted is None else pull(neurons, inverted)
    rows = []
    for index, layer in enumerate(neurons.layers):
        columns = {"uclc": bounds[index], **observed[index]}
        if pulls is not None:
            columns["pull"] = pulls[layer.neurons]
        module = neurons.layer_in(network, layer.module)
        if layer.normalised:
            columns |= _statistics_gap(module, columns.pop("mean"), columns.pop("variance"))
        if not isinstance(module, WEIGHTED):  # a normalisation
            affine = {"weight": module.weight, "bias": module.bias}
            columns |= {name: value.detach() for name, value in affine.items() if isinstance(value, Tensor)}
        features = torch.zeros(layer.size, len(STATIC_FEATURES), dtype=torch.float64)
        for column, name in enumerate(STATIC_FEATURES[:-1]):
            if name in columns:
                scores = standardise(columns[name].double().cpu())
                features[:, column] = scores if name == "uclc" else scores.clamp(-CLAMP, CLAMP)
        features[:, -1] = index / max(1, len(neurons.layers) - 1)
        rows.append(features)
    joined = torch.cat(rows).float()
    require_finite("a feature of a neuron", joined)
    return joined.numpy()


def pull(neurons: Neurons, inverted: InvertedTrigger) -> Tensor:
    """Derivative of the suspected target's mean margin under the inverted trigger by each neuron's mask, (neurons,)."""
    return mask_gradient(neurons, inverted.images, lambda logits: target_margin(logits, inverted.target).mean())


@torch.no_grad()
def _statistics_gap(norm: nn.Module, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """How the clean images' BN inputs differ from the statistics kept from training."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    running = norm.running_var.double().to(mean.device) + norm.eps
    clean = variance + norm.eps
    shift = (mean - norm.running_mean.double().to(mean.device)).abs()
    divergence = 0.5 * (torch.log(running / clean) + (clean + shift**2) / running - 1)
    return {
        "kl": torch.log1p(divergence.clamp(min=0)),
        "log_variance_ratio": torch.log(clean / running),
        "mean_shift": shift / running.sqrt(),
    }


def observe(neurons: Neurons, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Over all images: BN input moments, mean activation and saliency of each layer, float64, batch by batch.

    Moments are over classes of equal weight, see ``batch_norms.py``.
    """
    device = next(neurons.graph.parameters()).device
    total: list[dict[str, Tensor]] = [{} for _ in neurons.layers]
    weights = class_weights(labels.to(device)).double()
    at_once = min(BATCH, Sizes(neurons.graph, images[:1].to(device)).images_at_once)
    for batch, targets, weight in zip(*(values.split(at_once) for values in (images, labels, weights)), strict=True):
        masks = [torch.ones(layer.size, device=device, requires_grad=True) for layer in neurons.layers]
        observer = _Observer(neurons, weight)
        with torch.enable_grad():
            logits = observer.run(batch.to(device, memory_format=torch.channels_last), *masks)
            loss = F.cross_entropy(logits, targets.to(device))
            # What only looks at which value is the largest has no derivative.
            gradients = (
                torch.autograd.grad(loss, masks, allow_unused=True) if loss.requires_grad else [None] * len(masks)
            )
        share = len(batch) / len(images)
        for sums, observed, mask, gradient in zip(total, observer.observed, masks, gradients, strict=True):
            observed["gradient"] = (torch.zeros_like(mask) if gradient is None else gradient).detach()
            for name, value in observed.items():
                by = 1.0 if name in ("mean", "square") else share
                sums[name] = sums.get(name, 0) + by * value.double()
    for sums in total:
        sums["saliency"] = sums.pop("gradient").abs()
        if "square" in sums:
            sums["variance"] = (sums.pop("square") - sums["mean"] ** 2).clamp(min=0)
    return total


class _Observer(fx.Interpreter):
    """Runs the graph and keeps, of each neuron layer, moments of what its BN reads and the mean of what it gives.

    The moments are sums over the images by their weights.
    """

    def __init__(self, neurons: Neurons, weights: Tensor) -> None:
        super().__init__(neurons.graph)
        self.weights = weights
        self.layer_of = {layer.node: index for index, layer in enumerate(neurons.layers)}
        self.normalised = [layer.normalised for layer in neurons.layers]
        self.layers = neurons.layers
        self.observed: list[dict[str, Tensor]] = [{} for _ in neurons.layers]

    def run_node(self, n: fx.Node) -> Tensor:
        value = super().run_node(n)
        index = self.layer_of.get(n.name)
        if index is not None:
            observed = self.observed[index]
            if self.normalised[index]:
                read = self.env[n.all_input_nodes[0]].detach()
                values = by_image(read.double(), len(self.weights))
                observed["mean"], observed["square"] = (
                    self.weights @ values.mean(2),
                    self.weights @ values.square().mean(2),
                )
            layer = self.layers[index]
            positions = [axis for axis in range(value.ndim) if axis != layer.axis % value.ndim]
            observed["activation"] = layer.parts[0].by_neuron(
                value.detach().clamp(min=0).mean(dim=positions), layer.size
            )
        return value
