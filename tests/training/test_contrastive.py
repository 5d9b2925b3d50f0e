"""The contrastive loss over processes, its batches, and ranks of retrieval."""

import pytest
import torch
from torch import nn

from hf_attn import embedding_tokenizer
from hf_attn.analysis.retrieval import retrieval_ranks, retrieval_scores
from hf_attn.training.contrastive import ContrastiveCollator, contrastive_loss
from tests.batteries.text import byte_tokenizer
from tests.distributed.processes import in_processes


PAIRS, WIDTH = 6, 5


def gradients(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(3, PAIRS, WIDTH, generator=generator, dtype=torch.double)
    model = nn.Linear(WIDTH, 4).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, WIDTH, generator=generator))
        model.bias.zero_()
    loss = contrastive_loss(*(model(group[part]) for group in texts))
    loss.backward()
    return loss.detach(), model.weight.grad


def of_a_process(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return gradients(slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2))


def refused(rank: int) -> str:
    with pytest.raises(ValueError, match="1 to 2 texts") as error:
        contrastive_loss(torch.randn(rank + 1, 4), torch.randn(rank + 1, 4))
    return str(error.value)


def test_two_processes_have_the_gradients_of_one():
    loss, gradient = gradients(slice(None))
    processes = in_processes(of_a_process, 2)
    torch.testing.assert_close(sum(part[0] for part in processes) / 2, loss)
    torch.testing.assert_close(sum(part[1] for part in processes) / 2, gradient)


def test_unequal_batches_are_refused_in_all_processes():
    assert all("dataloader_drop_last" in message for message in in_processes(refused, 2))


def test_a_batch_has_queries_then_positives_then_negatives():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    collator = ContrastiveCollator(embedding_tokenizer(tokenizer), 6, query_prompt="q:")
    rows = [{"query": "a", "positive": "b", "negative": "c"}, {"query": "d", "positive": "efghijkl", "negative": "g"}]
    batch = collator(rows)
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == [f"{text}</s>" for text in ("q:a", "q:d", "b", "efghi", "c", "g")]
    assert batch["roles"].tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="in all rows or in none"):
        collator([rows[0], {"query": "a", "positive": "b"}])
    with pytest.raises(ValueError, match="needs the texts"):
        collator([{"query": "a"}])


def test_ranks_of_the_first_relevant_document():
    documents = torch.eye(3)[[0, 1, 1, 2]]
    ranks = retrieval_ranks(torch.eye(3), documents, [[0], [1], [3]])
    assert ranks.tolist() == [1, 2, 1]  # among equal scores, the relevant one is last
    assert retrieval_ranks(torch.eye(3), documents, [[0], [1, 2], [3]]).tolist() == [1, 1, 1]
    assert retrieval_ranks(torch.eye(3), documents, [[0], [1], [3]], [(), {2}, ()]).tolist() == [1, 1, 1]
    scores = retrieval_scores(ranks)
    assert scores == pytest.approx({"recall@1": 2 / 3, "recall@10": 1.0, "mrr": 2.5 / 3})
    with pytest.raises(ValueError, match="Query 0 has no relevant document"):
        retrieval_ranks(torch.eye(3)[:1], documents, [[0]], [[0]])
    with pytest.raises(ValueError, match="not finite"):
        retrieval_ranks(torch.full((1, 3), torch.nan), documents, [[0]])
