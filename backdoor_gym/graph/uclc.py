"""UCLC, the upper bound of each neuron's Lipschitz constant, from the weights alone.

CLP (Zheng et al., ECCV 2022, arXiv:2208.03111, section 4) bounds the channel Lipschitz constant of a convolution with
batch normalisation by ||W_k||_2 * |gamma_k / sigma_k|, where W_k is the kernel of output channel k as a matrix of shape
(C_in, k*k), ||.||_2 its largest singular value, and sigma_k the running standard deviation (without epsilon). Beyond the
paper, by the same argument:

- a batch normalisation that reads a sum: the bounds of all layers that write into the sum add up, since a Lipschitz
  constant of a sum is at most the sum of the constants; batch normalisations in between multiply theirs;
- no batch normalisation: the factor |gamma / sigma| is 1;
- a linear layer: W_k is a row, and its norm the Euclidean one;
- a running variance of zero: the square root of the layer's epsilon stands in for sigma, so that the bound is finite.
"""

import torch
from torch import Tensor, nn

from ..pruning.neurons import NeuronLayer, Neurons


@torch.no_grad()
def uclc(network: nn.Module, neurons: Neurons) -> list[Tensor]:
    """UCLC of each neuron, one float64 tensor (size,) a layer."""
    return bounds(network, neurons)


def bounds(network: nn.Module, neurons: Neurons) -> list[Tensor]:
    """The same with their derivatives by the weights (not by the running variances, which are no parameters)."""
    return [_layer_uclc(network, layer) for layer in neurons.layers]


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
    return torch.linalg.eigvalsh((kernels @ kernels.transpose(1, 2)).double())[:, -1].clamp(min=0).sqrt()


def norm_gain(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    """|gamma / sigma| of a batch normalisation, float64 (C,)."""
    assert norm.running_var is not None
    variance = norm.running_var.double()
    sigma = torch.where(variance > 0, variance, torch.full_like(variance, norm.eps)).sqrt()
    return norm.weight.double().abs() / sigma


def _layer_uclc(network: nn.Module, layer: NeuronLayer) -> Tensor:
    bound = torch.zeros(layer.size, dtype=torch.float64)
    for feeder in layer.feeders:
        weight = network.get_submodule(feeder.module).weight
        assert isinstance(weight, Tensor)
        part = spectral_norms(weight)
        for name in feeder.norms:
            part = part * norm_gain(_norm(network, name))
        bound += part.cpu()
    if layer.normalised:
        bound *= norm_gain(_norm(network, layer.module)).cpu()
    return bound


def _norm(network: nn.Module, name: str) -> nn.BatchNorm1d | nn.BatchNorm2d:
    norm = network.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    return norm
