"""Entropy of attention and its lower bound (arXiv 2303.06296)."""

import torch


def attention_entropy(attention: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    """Entropy `-sum_j p_j log p_j` of each row of attention weights, in nats.

    Args:
        attention: probabilities `(..., q_len, kv_len)`.
        eps: `log(p + eps)` instead of the exact `0 log 0 = 0`, as in the paper's speech code (1e-6).

    Returns:
        `(..., q_len)`, float32 or the dtype of the input if that is wider.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    if eps is None:
        return torch.special.entr(attention).sum(-1)
    return -(attention * torch.log(attention + eps)).sum(-1)


def entropy_lower_bound(logit_norm: torch.Tensor | float, num_keys: torch.Tensor | int) -> torch.Tensor:
    """Lower bound of the entropy of a row of attention, attained by one large logit and equal others.

    Args:
        logit_norm: bound on the L2 norm of the row of logits, for instance `||W_K W_Q^T||_2 ||X X^T||_2` times the scale
            of the logits.
        num_keys: number of keys of the row; broadcast against `logit_norm`.

    Returns:
        The bound in nats: `log n` for a norm of 0, falling like `n s exp(-s)` for a large norm `s`, 0 for one key.
    """
    s = torch.as_tensor(logit_norm)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    n = torch.as_tensor(num_keys, dtype=s.dtype, device=s.device)
    others = n - 1
    # n / (n - 1) is undefined for a single key, whose entropy is always 0.
    ratio = torch.where(others > 0, n / others.clamp(min=1), torch.ones_like(n))
    beta = torch.exp(-s * ratio.sqrt())
    bound = torch.log1p(others * beta) + s * (n * others).sqrt() * beta / (1 + others * beta)
    return torch.where(others > 0, bound, torch.zeros_like(bound))
