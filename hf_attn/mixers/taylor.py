"""Attention with polynomials in the place of the exponential of softmax (arXiv 2510.11602, `approximate`).

With s_ij = q_i . k_j / sqrt(head_dim):

    taylor_joint      A_ij = w_ij / sum_{j' <= i} w_ij',   w = 1 + s + s^2 / 2
    taylor_per_order  A = A0 + A1 + A2, each with a sum of its own, of w = 1, s and sum_d (q_id k_jd)^2

A polynomial in s is a product of features of the query and features of the key, so that sums over earlier tokens have a constant
size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Term:
    """Weights with one normaliser.

    Attributes:
        weights: `(queries, keys)` -> `(..., q_len, kv_len)`.
        features: of queries or keys, `(..., length, features)`; their products are the weights.
    """

    weights: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    features: Callable[[torch.Tensor], torch.Tensor]


def _joint_weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2)
    return 1 + scores + scores.square() / 2


def _joint_features(states: torch.Tensor) -> torch.Tensor:
    """`[1, x, x_i x_j for i < j, x_i^2 / sqrt(2)]`: half as many as all products."""
    size = states.shape[-1]
    first, second = torch.triu_indices(size, size, device=states.device)
    factor = torch.where(first == second, 0.5**0.5, 1.0)
    products = states[..., first] * states[..., second] * factor
    return torch.cat((torch.ones_like(states[..., :1]), states, products), -1)


JOINT = (Term(_joint_weights, _joint_features),)
PER_ORDER = (
    Term(
        lambda query, key: torch.ones_like(query[..., :1]) @ torch.ones_like(key[..., :1]).transpose(-1, -2),
        lambda states: torch.ones_like(states[..., :1]),
    ),
    Term(lambda query, key: query @ key.transpose(-1, -2), lambda states: states),
    Term(
        lambda query, key: query.square() @ key.square().transpose(-1, -2),
        lambda states: states.square(),
    ),
)
#: kind of mixer -> its terms
TAYLOR_TERMS = {"taylor_joint": JOINT, "taylor_per_order": PER_ORDER}


def _nonzero(normaliser: torch.Tensor) -> torch.Tensor:
    # Zero where a query sees padding only; the numerator is zero there too.
    return torch.where(normaliser == 0, 1.0, normaliser)


def taylor_weights(
    query: torch.Tensor, key: torch.Tensor, terms: Sequence[Term] = JOINT, valid: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The causal map of each term: the readable form.

    Args:
        query, key: `(..., length, head_dim)`; the scale of the scores is in the queries.
        terms: [`JOINT`] or [`PER_ORDER`].
        valid: true for tokens that are not padding, broadcastable to `(..., 1, length)`.

    Returns:
        `(..., length, length)` for each term; rows sum to 1.
    """
    maps = []
    for term in terms:
        weights = term.weights(query, key).tril()
        if valid is not None:
            weights = weights * valid
        maps.append(weights / _nonzero(weights.sum(-1, keepdim=True)))
    return maps


def taylor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Sequence[Term] = JOINT,
    valid: torch.Tensor | None = None,
    sums: Sequence[torch.Tensor] | None = None,
    keep_sums: bool = False,
    chunk: int = 512,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """The output of the maps, in time linear in the length: maps within chunks, sums of features between them.

    Args:
        query, key, value: `(..., length, head_dim)`, float32; the scale of the scores is in the queries. Leading dimensions
            broadcast.
        terms: [`JOINT`] or [`PER_ORDER`].
        valid: true for tokens that are not padding, broadcastable to `(..., length, 1)`.
        sums: for each term the sum over earlier tokens of `features(k)^T [v, 1]`, `(..., features, head_dim + 1)`.
        keep_sums: whether to return the sums after the last token.
        chunk: length of chunks.

    Returns:
        Output `(..., length, head_dim)`, and the sums or `None`.
    """
    value = torch.nn.functional.pad(value, (0, 1), value=1.0)
    if valid is not None:
        value = value * valid
    sums = list(sums) if sums is not None else [None] * len(terms)
    outputs = []
    starts = range(0, query.shape[-2], chunk)
    for start in starts:
        part = slice(start, start + chunk)
        queries, keys, values = (states[..., part, :] for states in (query, key, value))
        output = 0.0
        for index, term in enumerate(terms):
            result = term.weights(queries, keys).tril() @ values
            if sums[index] is not None:
                result = result + term.features(queries) @ sums[index]
            output = output + result[..., :-1] / _nonzero(result[..., -1:])
            if keep_sums or start != starts[-1]:
                added = term.features(keys).transpose(-1, -2) @ values
                sums[index] = added if sums[index] is None else sums[index] + added
        outputs.append(output)
    return torch.cat(outputs, -2), sums if keep_sums else None
