"""Retrieval metrics of embeddings."""

from collections.abc import Collection, Sequence

import torch
from torch.nn import functional as F


def retrieval_ranks(
    queries: torch.Tensor,
    documents: torch.Tensor,
    relevant: Sequence[Collection[int]],
    ignored: Sequence[Collection[int]] | None = None,
) -> torch.Tensor:
    """Rank, from 1, of the first relevant document of each query, by cosine similarity.

    Relevant documents do not count against each other; of equal similarities, irrelevant documents come first.

    Args:
        queries: `(queries, width)`.
        documents: `(documents, width)`.
        relevant: for each query the indices of the documents that answer it.
        ignored: for each query the indices of documents that are left out, such as the query's own text.

    Raises:
        ValueError: if the numbers do not fit, a query has no relevant document, or a score is not finite.
    """
    if len(relevant) != len(queries) or len(queries) == 0:
        raise ValueError(
            f"Each query needs its relevant documents: got {len(queries)} queries and relevant documents for "
            f"{len(relevant)}."
        )
    if ignored is not None and len(ignored) != len(queries):
        raise ValueError(f"Got documents to ignore for {len(ignored)} queries, but {len(queries)} queries.")
    scores = F.normalize(queries.float(), dim=-1) @ F.normalize(documents.float(), dim=-1).t()
    if not bool(scores.isfinite().all()):
        raise ValueError("Some similarities are not finite: an embedding has NaN or infinite entries.")
    is_relevant, is_ignored = torch.zeros(2, *scores.shape, dtype=torch.bool, device=scores.device)
    for row, (found, left_out) in enumerate(zip(relevant, ignored or [()] * len(queries), strict=True)):
        is_relevant[row, list(found)] = True
        is_ignored[row, list(left_out)] = True
    is_relevant &= ~is_ignored
    if not bool(is_relevant.any(dim=1).all()):
        raise ValueError(f"Query {int(is_relevant.any(dim=1).int().argmin())} has no relevant document.")
    best = scores.masked_fill(~is_relevant, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~is_relevant & ~is_ignored).sum(dim=1) + 1


def retrieval_scores(ranks: torch.Tensor) -> dict[str, float]:
    """`recall@1`, `recall@10` and mean reciprocal rank (`mrr`) of ranks."""
    ranks = ranks.double()
    return {
        "recall@1": (ranks <= 1).double().mean().item(),
        "recall@10": (ranks <= 10).double().mean().item(),
        "mrr": ranks.reciprocal().mean().item(),
    }
