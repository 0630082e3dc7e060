"""UCLC, the upper bound of each neuron's Lipschitz constant, from the weights alone.

CLP (Zheng et al., ECCV 2022, arXiv:2208.03111, section 4) bounds the channel Lipschitz constant of a convolution with
batch normalisation by ||W_k||_2 * |gamma_k / sigma_k|, where W_k is the kernel of output channel k as a matrix of shape
(C_in, k*k), ||.||_2 its largest singular value, and sigma_k the running standard deviation (without epsilon). Beyond the
paper, by the same argument:

- *No normalisation*: the factor |gamma / sigma| is 1.
- *Linear layer*: f_k(x) = w_k x + b_k, and |f_k(x) - f_k(y)| <= ||w_k||_2 ||x - y||_2 by Cauchy and Schwarz, with equality
  along w_k: the bound is the Euclidean norm of the row.
- *Grouped and depthwise convolutions*: channel k reads the C_in / groups channels of its group alone. Its matrix over all
  C_in channels has rows of zeros for the others, which leave the largest singular value as it is; the kernel as stored, of
  shape (C_in / groups, k*k), gives it. A depthwise kernel is one row, and its norm the Euclidean one.
- *A batch normalisation that reads a sum*: the bounds of all layers that write into the sum add up, as
  ||f(x) + g(x) - f(y) - g(y)|| <= (L_f + L_g) ||x - y||; normalisations in between multiply theirs. A product with a gate
  between 0 and 1 is bounded by what is gated, the gate taken as it is for the image.
- *A batch normalisation that reads a concatenation*: channel k is a channel of one of the parts, and has the bound of it.
- *Layer normalisation* (group and instance normalisation alike), y = gamma * (x - mu(x)) / sigma(x) + beta: its Jacobian is
  diag(gamma) P(x) / sigma(x), where P(x) = I - 11'/C - uu'/C (u the normalised x) is a projection, of norm 1 at most. A
  linear unit that reads it is bounded by ||w_k * gamma||_2 / sigma(x), and channel k of a normalisation that reads one
  layer by ||W_k||_2 |gamma_k| / sigma(x). sigma(x) is that of the image (and position), not of
  training, so no number stands for it; but it is the same for all neurons that read the same normalisation, and CLP
  compares within a layer: it is left out, as if it were 1.
- *A head of an attention* has the largest bound of its queries, keys and values.
- *A layer that is used several times* has the bound of each single use.
- A running variance of zero: the square root of the layer's epsilon stands in for sigma, so that the bound is finite.
"""

import torch
from torch import Tensor, nn

from ..neurons.layers import Feeder, NeuronLayer, Neurons


@torch.no_grad()
def uclc(network: nn.Module, neurons: Neurons) -> list[Tensor]:
    """UCLC of each neuron, one float64 tensor (size,) a layer.

    Args:
        network: the network whose neurons these are, or its traced copy ``neurons.graph``.
        neurons: its neurons.
    """
    return bounds(network, neurons)


def bounds(network: nn.Module, neurons: Neurons) -> list[Tensor]:
    """The same with their derivatives by the weights (not by the running variances, which are no parameters)."""
    return [_layer_uclc(network, neurons, layer) for layer in neurons.layers]


def spectral_norms(weight: Tensor) -> Tensor:
    """Largest singular value of each output channel's kernel, float64 (C_out,).

    It is the root of the largest eigenvalue of the smaller Gram matrix, for all channels in one batch. The matrix is
    computed in the weights' own precision, which costs the largest eigenvalue no more than rounding, unlike the smaller ones.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weight.ndim == 2 or weight[0, 0].numel() == 1:
        return weight.double().flatten(1).norm(dim=1)
    kernels = weight.flatten(2)
    if kernels.shape[1] > kernels.shape[2]:
        kernels = kernels.transpose(1, 2)
    largest = torch.linalg.eigvalsh((kernels @ kernels.transpose(1, 2)).double())[:, -1]
    positive = largest > 0
    return torch.where(positive, largest, 1).sqrt() * positive  # a root of zero has no derivative


def norm_gain(norm: nn.Module) -> Tensor | float:
    """|gamma / sigma| of a batch normalisation, |gamma| of any other one, float64 (C,); 1 without gamma."""
    gain = norm.weight.double().abs() if isinstance(norm.weight, Tensor) else 1.0
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_var is None:
        return gain
    variance = norm.running_var.double()
    return gain / torch.where(variance > 0, variance, torch.full_like(variance, norm.eps)).sqrt()


def _layer_uclc(network: nn.Module, neurons: Neurons, layer: NeuronLayer) -> Tensor:
    bound = torch.zeros(layer.size, dtype=torch.float64)
    for feeder in layer.feeders:
        part = spectral_norms(_scaled_weight(network, neurons, feeder))
        for name in feeder.norms:
            part = part * norm_gain(neurons.layer_in(network, name))
        rows, largest = feeder.of_rows(part.cpu())
        bound += torch.zeros_like(bound).scatter_reduce(
            0, rows, largest, "amax"
        )  # of a head the largest of its channels
    if all(feeder.module != layer.module for feeder in layer.feeders):
        gain = norm_gain(neurons.layer_in(network, layer.module))
        bound *= gain.cpu() if isinstance(gain, Tensor) else gain
    return bound


def _scaled_weight(network: nn.Module, neurons: Neurons, feeder: Feeder) -> Tensor:
    """The weight (C_out, C_in / groups, ...), times the gamma of the normalisation that it reads."""
    module = neurons.layer_in(network, feeder.module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    gamma = None if feeder.scale is None else neurons.layer_in(network, feeder.scale).weight
    groups, inputs = getattr(module, "groups", 1), weight.shape[1]
    if not isinstance(gamma, Tensor) or inputs * groups % len(gamma):
        return weight
    gamma = gamma.repeat_interleave(inputs * groups // len(gamma))  # of flattened images, each of a channel
    by_output = gamma.view(groups, inputs).repeat_interleave(len(weight) // groups, dim=0)
    return weight * by_output.view(len(weight), inputs, *[1] * (weight.ndim - 2))
