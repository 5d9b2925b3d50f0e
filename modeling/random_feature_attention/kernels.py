"""The kernels of random-feature attention with infinitely many heads."""

import math

import numpy
import torch

from .features import append_one


#: entries `(rows, samples, keys, keys)` that are computed at once
_ENTRIES = 2**21
#: nodes of the Gauss-Legendre rule for the biased kernel
_NODES = 48


def infinite_head_kernel(
    inputs_embeds: torch.Tensor,
    others: torch.Tensor | None = None,
    biased: bool = False,
    weight_std: float = 0.5,
) -> torch.Tensor:
    """`K(x, x') = lim (1/M) <phi(x), phi(x')>`: the mean over pairs of keys of `kappa <x~_i, x~'_j>`.

    `kappa` is the mean of `relu(s) relu(s')` over the random matrices, of the scores of both keys.

    Args:
        inputs_embeds: `(n, 1 + keys, d)`.
        others: `(m, 1 + keys, d)`; the same if not given. The number of keys may be another.
        biased: whether the matrices have the mean `block-diag(I_d, 0)`.
        weight_std: standard deviation of their entries.

    Returns:
        `(n, m)`.

    Raises:
        ValueError: if the inputs have other shapes, or the standard deviation is not positive.
    """
    others = inputs_embeds if others is None else others
    for tokens in (inputs_embeds, others):
        if tokens.ndim != 3 or tokens.shape[1] < 2 or tokens.shape[2] != inputs_embeds.shape[2]:
            raise ValueError(
                "Inputs of the kernel must have the shape (samples, 1 + keys, width) with at least one key and the "
                f"same width, got {tuple(inputs_embeds.shape)} and {tuple(others.shape)}."
            )
    if not weight_std > 0:
        raise ValueError(f"weight_std must be positive, got {weight_std}.")
    keys = (inputs_embeds.shape[1] - 1) * (others.shape[1] - 1)
    rows = max(1, _ENTRIES // max(1, len(others) * keys))
    blocks = [_kernel_block(block, others, biased, weight_std) for block in inputs_embeds.split(rows) if len(block)]
    return torch.cat(blocks) if blocks else inputs_embeds.new_zeros(0, len(others))


def _kernel_block(left: torch.Tensor, right: torch.Tensor, biased: bool, weight_std: float) -> torch.Tensor:
    queries, keys = (
        (append_one(left[:, 0]), append_one(right[:, 0])),
        (append_one(left[:, 1:]), append_one(right[:, 1:])),
    )
    products = torch.einsum("nia,mja->nmij", *keys)
    # Standard deviations of the scores, and their correlation.
    left_std, right_std = (
        weight_std * query.norm(dim=-1, keepdim=True) * key.norm(dim=-1)
        for query, key in zip(queries, keys, strict=True)
    )
    scale = left_std[:, None, :, None] * right_std[None, :, None, :]
    covariance = weight_std**2 * (queries[0] @ queries[1].T)[:, :, None, None] * products
    correlation = (covariance / scale).clamp(-1, 1)
    if biased:
        means = [torch.einsum("na,nia->ni", tokens[:, 0], tokens[:, 1:]) for tokens in (left, right)]
        a = (means[0] / left_std)[:, None, :, None].expand_as(correlation)
        b = (means[1] / right_std)[None, :, None, :].expand_as(correlation)
        moments = relu_product_mean(correlation, a, b)
    else:
        moments = arc_cosine_kernel(correlation)
    return (scale * moments * products).mean((2, 3))


def arc_cosine_kernel(correlation: torch.Tensor) -> torch.Tensor:
    """`E relu(z) relu(z')` of standard normal variables with a correlation."""
    sine = (1 - correlation.square()).clamp(min=0).sqrt()
    return (sine + correlation * (math.pi - torch.arccos(correlation))) / (2 * math.pi)


def relu_product_mean(correlation: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`E relu(a + z) relu(b + z')` of standard normal variables with a correlation.

    Its second derivative by the correlation is the bivariate normal density at `(a, b)`, so that it is the value and the slope
    for independent variables and an integral of the density, here over `theta = arcsin(correlation)`, in which the integrand
    is smooth.
    """
    cdf_a, cdf_b = torch.special.ndtr(a), torch.special.ndtr(b)
    mean_a, mean_b = (
        x * cdf + torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) for x, cdf in ((a, cdf_a), (b, cdf_b))
    )
    angle = torch.arcsin(correlation)
    integral = torch.zeros_like(correlation)
    for node, weight in zip(*numpy.polynomial.legendre.leggauss(_NODES), strict=True):
        theta = angle * ((1 + float(node)) / 2)
        sine = theta.sin()
        exponent = (a.square() + b.square() - 2 * a * b * sine) / (2 * theta.cos().square()).clamp(min=1e-300)
        integral = integral + float(weight) / 2 * (correlation - sine) * torch.exp(-exponent)
    return mean_a * mean_b + correlation * cdf_a * cdf_b + angle * integral / (2 * math.pi)
