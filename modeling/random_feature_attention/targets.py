"""Functions of a query and of a set of keys that the models are compared on."""

import torch


#: families of target functions
TARGETS = ("query", "key", "corr", "mixture")


def target_function(
    inputs_embeds: torch.Tensor,
    beta: torch.Tensor,
    name: str,
    p: int = 1,
    q: int = 0,
    mixing: float = 0.5,
    key_power: int = 1,
) -> torch.Tensor:
    """Evaluate a target.

    - `query`: `<beta, x_0>^p`
    - `key`: the mean over keys of `<beta, x_i>^p`
    - `corr`: the mean over keys of `<x_0, x_i>^p <beta, x_i>^q`
    - `mixture`: `mixing` times `corr`, and `1 - mixing` times `key` with the power `key_power`

    Args:
        inputs_embeds: `(n, 1 + keys, d)`.
        beta: `(d,)`, a direction of norm 1.
        name: one of [`TARGETS`].
        p: power.
        q: power of the direction in `corr`, 0 for none.
        mixing: share of `corr` in `mixture`.
        key_power: power of `key` in `mixture`.

    Returns:
        `(n,)`.

    Raises:
        ValueError: for an unknown family, a power below 0 or a direction of another width.
    """
    if name not in TARGETS:
        raise ValueError(f"There is no target {name!r}. Targets: {', '.join(TARGETS)}.")
    if min(p, q, key_power) < 0:
        raise ValueError(f"Powers of targets must be at least 0, got p={p}, q={q}, key_power={key_power}.")
    if beta.shape != inputs_embeds.shape[-1:]:
        raise ValueError(f"beta must be ({inputs_embeds.shape[-1]},), the width of a token, got {tuple(beta.shape)}.")
    query, keys = inputs_embeds[:, 0], inputs_embeds[:, 1:]
    if name == "query":
        return (query @ beta) ** p
    if name == "key":
        return ((keys @ beta) ** p).mean(1)
    correlations = torch.einsum("nd,nid->ni", query, keys)
    correlated = (correlations**p * (keys @ beta) ** q).mean(1)
    if name == "corr":
        return correlated
    return mixing * correlated + (1 - mixing) * ((keys @ beta) ** key_power).mean(1)


def sphere(*shape: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Uniform points `shape` on the unit sphere of the last dimension."""
    points = torch.randn(*shape, generator=generator, dtype=dtype)
    return points / points.norm(dim=-1, keepdim=True)
