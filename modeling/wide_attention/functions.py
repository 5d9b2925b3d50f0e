"""Attention types other than softmax over single keys, as functions of queries, keys and values.

Queries, keys and values are `(batch, heads, length, head_dim)`, `mask` is boolean `(batch, 1, length, 1)`, false for padding.
Padding is left out as a key; the results for padded queries are finite and mean nothing.
"""

import torch


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Attention with the kernel `phi(q)^T phi(k)` instead of the exponential (arXiv 2006.16236)."""
    return kernel_attention(elu_features(query), elu_features(key) * mask, value * mask, eps)


def elu_features(states: torch.Tensor) -> torch.Tensor:
    """Feature map of linear attention, `elu(x) + 1`."""
    return torch.nn.functional.elu(states) + 1


def kernel_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`o_i = phi_i^T sum_j phi_j v_j^T / (phi_i^T sum_j phi_j + eps)` of features that are not negative."""
    summary = key.transpose(-2, -1) @ value
    return query @ summary / (query @ key.sum(-2)[..., None] + eps)


def relu_features(states: torch.Tensor, directions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Performer's generalised features, `relu(W x) + 1e-3` (arXiv 2009.14794).

    Args:
        directions: `(num_features, head_dim)`.
    """
    return (torch.relu(states @ directions.T) + 1e-3) * mask / directions.shape[0] ** 0.5


def softmax_features(states: torch.Tensor, directions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Performer's positive features of the softmax kernel, `exp(W x - |x|^2 / 2)`, of states scaled by `head_dim ** -0.25`.

    All keys share one factor, which the division of attention removes: the largest exponent is subtracted from all.
    """
    return _softmax_features(states, directions, mask, (-2, -1))


def softmax_query_features(states: torch.Tensor, directions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[`softmax_features`] of queries: each has a factor of its own, which the division removes."""
    return _softmax_features(states, directions, mask, (-1,))


def _softmax_features(states, directions, mask, over):
    states = states * states.shape[-1] ** -0.25
    exponents = states @ directions.T - states.square().sum(-1, keepdim=True) / 2
    exponents = exponents.masked_fill(~mask, torch.finfo(exponents.dtype).min)
    return (exponents - exponents.amax(over, keepdim=True).detach()).exp() * mask


def performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    directions: torch.Tensor,
    kernel: str,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Attention with random features (arXiv 2009.14794): `"relu"`, or `"softmax"` whose expectation is softmax attention."""
    if kernel == "relu":
        query, key = relu_features(query, directions, mask), relu_features(key, directions, mask)
    else:
        query, key = softmax_query_features(query, directions, mask), softmax_features(key, directions, mask)
    return kernel_attention(query, key, value * mask, eps)


def linformer_projection(states: torch.Tensor, projection: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Keys or values of `length` tokens as `rank` mixtures of them, `P^T K` (arXiv 2006.04768).

    Args:
        projection: `(max_length, rank)`.
    """
    return projection[: states.shape[-2]].T @ (states * mask)


def sinkhorn_permutation(key: torch.Tensor, mask: torch.Tensor, scores: torch.nn.Linear) -> torch.Tensor:
    """The soft permutation of blocks (arXiv 2002.11296): row `i` has the weights of the blocks that block `i` attends to in addition to itself.

    Args:
        key: `(batch, heads, blocks, block_size, head_dim)`.
        mask: `(batch, 1, blocks, block_size, 1)`.
        scores: from `head_dim` to the largest number of blocks.

    Returns:
        `(batch, heads, blocks, blocks)`; blocks that contain only padding have no weight.
    """
    blocks = key.shape[2]
    logits = scores((key * mask).sum(-2))[..., :blocks]
    seen = mask.any(-2).transpose(-2, -1)
    return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen


def sinkhorn_blocks(
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, permutation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and mask that each block attends to: its own and the mixture of blocks.

    All are `(batch, heads or 1, blocks, 2 * block_size, head_dim or 1)`.
    """

    def mixed(states: torch.Tensor) -> torch.Tensor:
        return (permutation @ (states * mask).flatten(3)).unflatten(3, states.shape[3:])

    somewhere = mask.any(2, keepdim=True).expand_as(mask)
    return (
        torch.cat([key, mixed(key)], dim=3),
        torch.cat([value, mixed(value)], dim=3),
        torch.cat([mask, somewhere], dim=3),
    )
