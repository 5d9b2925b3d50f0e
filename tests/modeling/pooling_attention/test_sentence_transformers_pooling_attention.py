"""Saved embedders in sentence-transformers: loading, prompts, training, MTEB's protocol."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, set_seed

from hf_attn import PoolingAttentionConfig, PoolingAttentionModel, embedding_tokenizer
from tests.batteries.text import byte_tokenizer


sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `embeddings` is not installed")

TEXTS = ["a", "some words", "other words, and more of them", ""]


def save(folder, **overrides):
    set_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = PoolingAttentionConfig.from_variant("tiny", vocab_size=257, **overrides)
    model = PoolingAttentionModel(config).eval()
    model.save_pretrained(folder)
    tokenizer = embedding_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def embed(model, tokenizer, texts):
    with torch.no_grad():
        return torch.cat([model(**tokenizer([text], return_tensors="pt")).pooler_output for text in texts]).numpy()


@pytest.mark.parametrize("design", range(1, 6))
def test_what_is_saved_loads_and_gives_the_same_embeddings(tmp_path, design):
    model, tokenizer = save(tmp_path, design=design)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert encoder.get_embedding_dimension() == 32
    expected = embed(model, tokenizer, TEXTS)
    found = encoder.encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again = tmp_path / "again"
    encoder.save_pretrained(str(again))
    reloaded = sentence_transformers.SentenceTransformer(str(again), device="cpu")
    np.testing.assert_array_equal(reloaded.encode(TEXTS, batch_size=3), found)
    torch.testing.assert_close(AutoModel.from_pretrained(again).state_dict(), model.state_dict(), atol=0, rtol=0)


def test_prompts_of_the_configuration_reach_queries_and_documents(tmp_path):
    model, tokenizer = save(tmp_path, prompts={"query": "find: "})
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(
        encoder.encode_query(TEXTS), embed(model, tokenizer, [f"find: {t}" for t in TEXTS]), atol=1e-5
    )
    np.testing.assert_allclose(encoder.encode_document(TEXTS), embed(model, tokenizer, TEXTS), atol=1e-5)
    encoder.prompts["document"] = "text: "
    encoder.save_pretrained(str(tmp_path / "again"))
    assert sentence_transformers.SentenceTransformer(str(tmp_path / "again")).prompts["document"] == "text: "


def test_its_trainer_learns_with_multiple_negatives(tmp_path):
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    save(tmp_path / "model")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    words = [f"{left}{right}" for left in "abcd" for right in "efgh"]
    data = Dataset.from_dict({"anchor": words, "positive": [word.upper() for word in words]})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        max_steps=30,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=5,
    )
    trainer = sentence_transformers.SentenceTransformerTrainer(
        encoder, arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(encoder, scale=20)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
