"""The collator: positions of landmarks, and targets."""

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_attn.modeling.landmark.configuration_landmark import LandmarkConfig
from hf_attn.modeling.landmark.data import LandmarkDataCollator
from hf_attn.modeling.landmark.modeling_landmark import LandmarkForCausalLM


def make_config(**overrides) -> LandmarkConfig:
    return LandmarkConfig(
        vocab_size=40,
        landmark_token_id=39,
        mem_freq=3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **overrides,
    )


def test_landmarks_are_targets():
    batch = LandmarkDataCollator(make_config(), pad_token_id=1)([{"input_ids": range(10, 16)}, {"input_ids": [7, 8]}])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 39, 13, 14, 15], [7, 8, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[10, 11, 12, 39, 13, 14, 15], [7, 8, -100, -100, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 0, 0, 0, 0, 0]]


def test_the_paper_s_lengths():
    config = LandmarkConfig(mem_freq=50)
    assert LandmarkDataCollator(config)([{"input_ids": [5] * 512}])["input_ids"].shape == (1, 522)


def test_targets_skip_landmarks():
    config = make_config(include_landmark_in_loss=False)
    batch = LandmarkDataCollator(config, no_loss_after=[14])([{"input_ids": range(10, 17)}])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == [10, 11, 12, 39, 13, 14, 15, 39, 16]
    predictions = {(place, ids[place]): labels[place + 1] for place in range(8)}
    assert predictions == {
        (0, 10): 11,
        (1, 11): 12,
        (2, 12): 13,
        (3, 39): -100,
        (4, 13): 14,
        (5, 14): -100,
        (6, 15): 16,
        (7, 39): -100,
    }


def test_labels_of_the_caller_are_kept():
    feature = {"input_ids": range(10, 17), "labels": [-100] * 4 + [14, 15, 16]}
    labels = LandmarkDataCollator(make_config())([feature])["labels"]
    assert labels.tolist() == [[-100, -100, -100, -100, -100, 14, 15, 39, 16]]


def test_bad_sequences_are_refused():
    collator = LandmarkDataCollator(make_config())
    with pytest.raises(ValueError, match=r"already contains landmarks \(token 39\)"):
        collator([{"input_ids": [3, 39]}])
    with pytest.raises(ValueError, match="1 labels for 2 tokens"):
        collator([{"input_ids": [3, 4], "labels": [3]}])
    with pytest.raises(ValueError, match="no_loss_after is only for"):
        LandmarkDataCollator(make_config(), no_loss_after=[2])


@pytest.mark.parametrize("included", [True, False])
def test_trainer_learns_and_inference_agrees(included, tmp_path):
    """After training on one text, `generate` reproduces it and inserts the landmarks at the same positions."""
    set_seed(0)
    config = make_config(include_landmark_in_loss=included, train_context_length=24)
    text = torch.randperm(38)[:20].tolist()
    trainer = Trainer(
        LandmarkForCausalLM(config),
        TrainingArguments(
            tmp_path,
            max_steps=60,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        ),
        data_collator=LandmarkDataCollator(config),
        train_dataset=[{"input_ids": text}] * 4,
    )
    trainer.train()
    model = trainer.model.eval()
    prompt = torch.tensor([text[:4]])
    for options in ({}, {"cache_top_k": 6}):
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=0, **options,
        )  # fmt: skip
        assert generated[0].tolist() == text
