"""Retrieval metrics of embeddings."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def retrieval_ranks(queries: torch.Tensor, documents: torch.Tensor, relevant: Sequence[int]) -> torch.Tensor:
    """Rank of each query's document among all, by cosine similarity, from 1; ties count as better.

    Args:
        queries: `(queries, width)`.
        documents: `(documents, width)`.
        relevant: index of the document of each query.

    Raises:
        ValueError: if the numbers do not fit, or a score is not finite.
    """
    if len(relevant) != len(queries) or len(queries) == 0:
        raise ValueError(f"Each query needs one relevant document, got {len(queries)} queries and {len(relevant)}.")
    scores = F.normalize(queries.float(), dim=-1) @ F.normalize(documents.float(), dim=-1).t()
    if not bool(scores.isfinite().all()):
        raise ValueError("Some similarities are not finite: an embedding has NaN or infinite entries.")
    own = scores.gather(1, torch.as_tensor(relevant, device=scores.device)[:, None])
    return (scores >= own).sum(dim=1)


def retrieval_scores(ranks: torch.Tensor) -> dict[str, float]:
    """`recall@1`, `recall@10` and mean reciprocal rank (`mrr`) of ranks."""
    ranks = ranks.double()
    return {
        "recall@1": (ranks <= 1).double().mean().item(),
        "recall@10": (ranks <= 10).double().mean().item(),
        "mrr": ranks.reciprocal().mean().item(),
    }
