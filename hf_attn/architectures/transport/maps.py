"""Costs of optimal transport, and the transported source."""

import torch


def squared_distances(
    source: torch.Tensor,
    target: torch.Tensor,
    source_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    """Squared Euclidean distances of all pairs, divided by the largest one of a sample.

    Args:
        source: `(batch, n, width)`.
        target: `(batch, m, width)`.
        source_mask: `(batch, n)`, false where there is padding. Pairs with padding are ignored.
        target_mask: `(batch, m)`.
        normalize: whether to divide by the largest entry.

    Returns:
        `(batch, n, m)` in float32 or float64, zero for pairs with padding.
    """
    dtype = torch.promote_types(source.dtype, torch.float32)
    source, target = source.to(dtype), target.to(dtype)
    # Distances do not change with the origin, and close to it fewer digits cancel.
    centre = target.mean(1, keepdim=True)
    source, target = source - centre, target - centre
    cost = source.square().sum(-1).unsqueeze(-1) + target.square().sum(-1).unsqueeze(-2)
    cost = torch.baddbmm(cost, source, target.mT, alpha=-2).clamp(min=0)
    if source_mask is not None:
        cost = cost.masked_fill(~source_mask.bool().unsqueeze(-1), 0)
    if target_mask is not None:
        cost = cost.masked_fill(~target_mask.bool().unsqueeze(-2), 0)
    if normalize:
        # All vectors may be the same.
        cost = cost / cost.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return cost


def transported(plan: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Barycentric map: each source row as the mean of the target rows that the plan sends it to, `diag(1 / P 1) P T`.

    Args:
        plan: `(batch, n, m)`; rows without mass, which are padding, become zero.
        target: `(batch, m, width)`.

    Returns:
        `(batch, n, width)` in the dtype of the target.
    """
    rows = plan.sum(-1, keepdim=True)
    shares = plan / torch.where(rows > 0, rows, 1)
    return (shares @ target.to(plan.dtype)).to(target.dtype)
