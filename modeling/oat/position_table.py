"""Position tables: one code for each row, column and flag, fixed while the model trains."""

import math

import torch

from .configuration_oat import OATConfig


def gaussian_table(num_positions: int, width: int, sigma: float) -> torch.Tensor:
    """Codes of equal length whose cosines are a Gaussian of their distance.

    The official code fits them with Adam to cos(W_i, W_j) = exp(-(i - j)^2 / (2 sigma^2)). The cosines of unit vectors are their
    Gram matrix, so an eigendecomposition of the target gives them at once, and exactly if `width >= num_positions`; in a random
    basis, as the official codes are, but always the same one.

    Args:
        num_positions: number of codes.
        width: channels of a code.
        sigma: width of the Gaussian, in positions.

    Returns:
        `(num_positions, width)`; the codes have length `sqrt(width)`, about that of standard normal vectors.
    """
    positions = torch.arange(num_positions, dtype=torch.float64, device="cpu")
    cosines = torch.exp(-((positions[:, None] - positions) ** 2) / (2 * sigma**2))
    eigenvalues, eigenvectors = torch.linalg.eigh(cosines)
    rank = min(num_positions, width)
    vectors = eigenvectors[:, -rank:] * eigenvalues[-rank:].clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64, device="cpu")).Q
    codes = torch.nn.functional.normalize(vectors @ basis.T, dim=-1) * math.sqrt(width)
    return codes.float()


def sinusoid_table(num_positions: int, width: int, kind: str, alpha: float) -> torch.Tensor:
    """Sines (even channels) and cosines (odd channels) of position times frequency.

    Args:
        num_positions: number of codes.
        width: channels of a code, even.
        kind: frequencies, see [`OATConfig`].
        alpha: their exponent or factor.
    """
    channels = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    frequencies = {
        "original": lambda: 10000 ** (-channels / width),
        "exp1": lambda: channels**alpha / width,
        "exp2": lambda: (channels / width) ** alpha,
        "linear": lambda: channels * alpha / width,
    }[kind]()
    angles = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def position_table(config: OATConfig) -> torch.Tensor:
    """The table `(num_positions, width)` that a new model of this configuration starts with."""
    if config.position_encoding == "gaussian":
        return gaussian_table(*config.position_table_shape, config.position_sigma)
    return sinusoid_table(*config.position_table_shape, config.position_encoding, config.position_alpha)
