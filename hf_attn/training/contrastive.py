"""Contrastive training of text embedders: in-batch negatives, also those of other processes, and hard negatives."""

import torch
from torch.nn import functional as F


#: temperature 0.05
SCALE = 20.0


def contrastive_loss(
    queries: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None = None,
    scale: float = SCALE,
) -> torch.Tensor:
    """Cross entropy of each query's own positive among all positives and hard negatives, by cosine similarity.

    In several processes the passages of all are gathered, with gradients. The loss is the mean over the queries of this
    process; gradients averaged over the processes, as distributed training does, are those of one process with all texts.
    Every process needs the same number of texts.

    Args:
        queries: `(batch, width)`.
        positives: `(batch, width)`; row i belongs to query i.
        negatives: hard negatives, `(count, width)`, for all queries.
        scale: factor of the similarities, the inverse of the temperature.

    Raises:
        ValueError: if queries and positives differ in number, or there are none.
    """
    if len(queries) != len(positives) or len(queries) == 0:
        raise ValueError(f"Each query needs its positive, got {len(queries)} queries and {len(positives)} positives.")
    rank = torch.distributed.get_rank() if _is_distributed() else 0
    passages = [gathered(positives)] + ([] if negatives is None else [gathered(negatives)])
    scores = F.normalize(queries, dim=-1) @ F.normalize(torch.cat(passages), dim=-1).t() * scale
    targets = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    return F.cross_entropy(scores.float(), targets)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum over the processes."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order, with gradients; the rows themselves in a single process."""
    if not _is_distributed() or torch.distributed.get_world_size() == 1:
        return rows
    counts = rows.new_tensor([len(rows)], dtype=torch.long)
    most, least = counts.clone(), counts.clone()
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    if most != least:
        raise ValueError(
            f"The processes have batches of {int(least)} to {int(most)} texts; negatives are gathered from equal batches. Drop "
            "the last batch (dataloader_drop_last=True)."
        )
    return _Gather.apply(rows)
