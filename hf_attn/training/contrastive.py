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
        raise ValueError(f"Each query needs one positive, got {len(queries)} queries and {len(positives)} positives.")
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
            f"The processes have batches of {int(least)} to {int(most)} texts, but gathering negatives needs equal "
            "batch sizes. Drop the last batch (dataloader_drop_last=True)."
        )
    return _Gather.apply(rows)


class ContrastiveCollator:
    """Makes one padded batch of all queries, then all positives, then all hard negatives.

    Args:
        tokenizer: one from `embedding_tokenizer`.
        max_length: tokens at which texts are cut, which the end-of-sequence token survives.
        query_prompt, document_prompt: put before every query, and before every positive and negative.
    """

    def __init__(self, tokenizer, max_length: int, query_prompt: str = "", document_prompt: str = ""):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.prompts = {"query": query_prompt, "positive": document_prompt, "negative": document_prompt}

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Collate rows of `query`, `positive` and, in all or none, `negative`; `roles` gives the role of each text."""
        roles = [role for role in self.prompts if rows[0].get(role) is not None]
        if any((row.get(role) is not None) != (role in roles) for row in rows for role in self.prompts):
            raise ValueError(
                "Some rows have a hard negative and others have none. Use hard negatives in all rows or in none."
            )
        if roles[:2] != ["query", "positive"]:
            raise ValueError(f"A row needs the texts 'query' and 'positive', got {', '.join(rows[0]) or 'nothing'}.")
        texts = [self.prompts[role] + row[role] for role in roles for row in rows]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "roles": torch.arange(len(roles)).repeat_interleave(len(rows)),
        }


class ContrastiveTrainerMixin:
    """Trains an embedder on batches of [`ContrastiveCollator`].

        class EmbeddingTrainer(ContrastiveTrainerMixin, transformers.Trainer): ...

    The model returns `pooler_output`. Gradients are those of one process with all texts. With gradient accumulation the
    negatives are those of each micro-batch.

    Args:
        scale: see [`contrastive_loss`].
    """

    def __init__(self, *args, scale: float = SCALE, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale
        # The loss is a mean over the micro-batch, which Trainer has to divide by their number.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The contrastive loss of a batch; see transformers' `Trainer.compute_loss`."""
        inputs = dict(inputs)
        roles = inputs.pop("roles")
        outputs = model(**inputs)
        groups = [outputs.pooler_output[roles == role] for role in range(int(roles.max()) + 1)]
        loss = contrastive_loss(*groups, scale=self.scale)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch; there are no predictions to gather."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None
