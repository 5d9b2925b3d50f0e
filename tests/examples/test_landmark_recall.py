"""Texts of facts, and small models that are trained to recall them."""

import random

import pytest
import torch

from hf_attn.examples.landmark_recall import (
    FOREIGN,
    LANDMARK,
    LLAMA,
    MEM_FREQ,
    MISREAD,
    MISSED,
    MODELS,
    RIGHT,
    Settings,
    answer,
    decode_seconds,
    evaluate,
    load,
    make_model,
    texts,
    train,
)
from hf_attn.examples.recall import RecallBatches, RecallTask, Stage


TASK = RecallTask(num_keys=6, num_values=5, num_filler=3)
TINY = Settings(hidden_size=16, first_steps=2, steps=4, num_tokens=512)


def test_a_text_states_facts_and_asks_for_them():
    for seed in range(20):
        text = TASK.text(40, 3, random.Random(seed))
        assert len(text.input_ids) == len(text.labels) == 40 and sorted(set(text.facts)) == sorted(text.facts)
        for question, fact in zip(text.questions, text.facts, strict=True):
            key, value = divmod(text.input_ids[fact], 5)
            assert text.input_ids[question : question + 2] == [30 + key, 36 + value]
            assert text.labels[question + 1] == 36 + value
        body = text.input_ids[: text.questions[0]]
        assert sum(token < 30 for token in body) == 3 and sum(41 <= token < 44 for token in body) == len(body) - 3
        assert sum(label != -100 for label in text.labels) == len(text.questions) == 3
    several = TASK.text(40, 3, random.Random(0), questions=9)
    assert len(several.questions) == 9 and len(set(several.facts)) <= 3


@pytest.mark.parametrize(
    ("length", "facts", "message"),
    [(40, 7, "between 1 and 6"), (8, 3, "take 9 tokens, but length is 8"), (40, 0, "between 1 and 6")],
)
def test_impossible_texts_are_refused(length, facts, message):
    with pytest.raises(ValueError, match=message):
        TASK.text(length, facts, random.Random(0))


def test_batches_follow_the_curriculum():
    stages = (Stage(0.0, 16, 2, 4), Stage(0.5, 64, 3, 4))
    batches = RecallBatches(TASK, stages, 40, 128, seed=0)
    shapes = [(len(batch), len(batch[0]["input_ids"])) for batch in (batches[step] for step in range(40))]
    assert set(shapes[:20]) == {(8, 16)} and set(shapes[20:]) == {(8, 16), (2, 64)}
    assert batches[7] == RecallBatches(TASK, stages, 40, 128, seed=0)[7] != batches[8]


def test_both_models_have_the_same_shape():
    landmark, llama = (make_model(name, TINY, 0).num_parameters() for name in (LANDMARK, LLAMA))
    assert landmark - llama == 2 * TINY.hidden_size  # embedding and output row of the landmark token


def test_train_load_and_evaluate(tmp_path):
    for name in MODELS:
        folder = train(name, TINY, 0, tmp_path / name, disable_tqdm=True)
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert train(name, TINY, 0, tmp_path / name, disable_tqdm=True) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
        result = evaluate(load(name, folder), 96, 2)
        assert sum(result["outcomes"].values()) == 16 and set(result["outcomes"]) <= {RIGHT, MISREAD, MISSED, FOREIGN}


def test_blocks_that_were_read_are_told_from_those_that_were_not():
    """A model that always answers with a value of the text, so that only the retrieved blocks decide."""
    model = make_model(LANDMARK, TINY, 0).eval()
    text = texts(40 * MEM_FREQ, 1)[0]
    named = text.input_ids[text.questions[0] + 1]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([named]), 1.0)
    )
    rights = sum(text.input_ids[question + 1] == named for question in text.questions)
    everything, one = answer(model, text, top_k=None), answer(model, text, top_k=1)
    assert everything.count(RIGHT) == one.count(RIGHT) == rights >= 1
    assert everything.count(MISREAD) == len(everything) - rights
    assert one.count(MISSED) + one.count(MISREAD) == len(one) - rights and MISSED in one


def test_decoding_is_timed():
    seconds = decode_seconds(64, TINY, repeats=1)
    assert set(seconds) == set(MODELS) and min(seconds.values()) > 0
