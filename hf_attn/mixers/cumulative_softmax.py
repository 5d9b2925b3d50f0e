"""Softmax over all tokens so far, with a score that a token has for itself (arXiv 2510.11602, `non_approximate`).

    A_ij = exp(s_j) / sum_{j' <= i} exp(s_j')    for j <= i

Every query sees the same scores, so the output is a running weighted mean. All exponentials here are of numbers that are at
most 0: scores above 1000 occur in trained models.
"""

import torch


#: score of padding; finite, so that differences of two of them are numbers
LOWEST = -1e30


def own_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Score of each token, of its own query and key, in float32.

    Args:
        query, key: `(..., length, head_dim)`.
        scaling: factor of the scores.

    Returns:
        `(..., length)`.
    """
    return (query.float() * key.float()).sum(-1) * scaling


def cumulative_softmax_weights(scores: torch.Tensor) -> torch.Tensor:
    """The map `(..., length, length)` of scores `(..., length)`: the readable form."""
    length = scores.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    return scores[..., None, :].expand(*scores.shape, length).masked_fill(~causal, -torch.inf).softmax(-1)


def initial_state(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state before any token: running maximum, and sums of `exp(s) [v, 1]` relative to it."""
    batch_and_heads = values.shape[:-2]
    return {
        "maximum": values.new_full(batch_and_heads, LOWEST, dtype=torch.float32),
        "sums": values.new_zeros(*batch_and_heads, values.shape[-1] + 1, dtype=torch.float32),
    }


def cumulative_softmax(
    scores: torch.Tensor, values: torch.Tensor, state: dict[str, torch.Tensor] | None = None, chunk: int = 64
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of the map, in time and memory linear in the length.

    Within chunks the map is formed; between chunks the sums are handed on.

    Args:
        scores: `(batch, heads, length)`, float32; [`LOWEST`] for padding.
        values: `(batch, heads, length, head_dim)`.
        state: of the earlier tokens; that before any token if not given.
        chunk: length of chunks.

    Returns:
        Output `(batch, heads, length, head_dim)`, float32, and the state after the last token.
    """
    state = initial_state(values) if state is None else state
    length = scores.shape[-1]
    if length == 1:
        return _step(scores, values, state)
    padding = -length % chunk
    scores = torch.nn.functional.pad(scores, (0, padding), value=LOWEST).unflatten(-1, (-1, chunk))
    values = torch.nn.functional.pad(values.float(), (0, 1), value=1.0)
    values = torch.nn.functional.pad(values, (0, 0, 0, padding)).unflatten(-2, (-1, chunk))

    # The result does not depend on what is subtracted, so no gradient needs to pass through the maxima.
    within = scores.detach().cummax(-1).values
    of_chunks = torch.cat((state["maximum"][..., None], within[..., -1]), -1)
    carried = of_chunks.detach().cummax(-1).values

    sums = (scores - within[..., -1:]).exp()[..., None, :] @ values
    sums = torch.cat((state["sums"][..., None, :], sums.squeeze(-2)), -2)
    to_later = _decay(of_chunks, carried)
    sums = to_later @ sums

    maximum = torch.maximum(within, carried[..., :-1, None])
    weights = _decay(scores, maximum)
    earlier = (carried[..., :-1, None] - maximum).exp()[..., None]
    result = weights @ values + earlier * sums[..., :-1, None, :]
    result = result.flatten(-3, -2)[..., :length, :]
    return result[..., :-1] / result[..., -1:], {"maximum": carried[..., -1], "sums": sums[..., -1, :]}


def _decay(scores: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """`exp(s_j - m_i)` for j <= i, else 0."""
    size = scores.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    return (scores[..., None, :] - maximum[..., None]).masked_fill(later, -torch.inf).exp()


def _step(scores: torch.Tensor, values: torch.Tensor, state: dict[str, torch.Tensor]):
    score = scores[..., 0]
    maximum = torch.maximum(score, state["maximum"])
    value = torch.nn.functional.pad(values[..., 0, :].float(), (0, 1), value=1.0)
    sums = (state["maximum"] - maximum).exp()[..., None] * state["sums"] + (score - maximum).exp()[..., None] * value
    return (sums[..., :-1] / sums[..., -1:])[..., None, :], {"maximum": maximum, "sums": sums}
