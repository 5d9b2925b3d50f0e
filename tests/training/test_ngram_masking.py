"""Masking of whole words in runs."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_attn import DataCollatorForNGramMasking
from scripts.run_deberta import train_tokenizer


TEXT = "the quick brown fox jumps over the lazy dog and runs away from everything that it has seen before today " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT.replace("quick", "qu ick")], 300)


def features(tokenizer, count=1):
    return [{"input_ids": tokenizer(TEXT)["input_ids"]} for _ in range(count)]


def test_whole_words_share_and_replacement(tokenizer):
    torch.manual_seed(0)
    rows = features(tokenizer, 60)
    batch = DataCollatorForNGramMasking(tokenizer)(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    share = chosen.sum() / (original.numel() - 2 * len(rows))
    assert abs(share - 0.15) < 0.01
    masked = (batch["input_ids"][chosen] == tokenizer.mask_token_id).float().mean()
    same = (batch["input_ids"][chosen] == original[chosen]).float().mean()
    assert abs(masked - 0.8) < 0.05 and abs(same - 0.1) < 0.05
    words = tokenizer(TEXT).word_ids()
    for row in chosen:
        for word in set(words) - {None}:
            of_word = {bool(row[position]) for position, other in enumerate(words) if other == word}
            assert len(of_word) == 1, "a word is masked whole or not at all"
    assert not chosen[:, 0].any() and not chosen[:, -1].any()


def test_single_words_and_runs(tokenizer):
    """With runs, masked words have masked neighbours more often."""

    def neighbours(max_ngram):
        torch.manual_seed(0)
        chosen = DataCollatorForNGramMasking(tokenizer, max_ngram=max_ngram)(features(tokenizer, 60))["labels"] != -100
        return (chosen[:, 1:] & chosen[:, :-1]).sum()

    assert neighbours(3) > 1.2 * neighbours(1)


def test_padding_and_given_words(tokenizer):
    short = {"input_ids": tokenizer("the fox")["input_ids"]}
    batch = DataCollatorForNGramMasking(tokenizer, pad_to_multiple_of=8)([*features(tokenizer), short])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"][1] != -100).any()
    given = {"input_ids": [7, 8, 9, 10], "word_ids": [0, 0, 0, 0]}
    assert (DataCollatorForNGramMasking(tokenizer)([given])["labels"] != -100).all()


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="length 0"):
        DataCollatorForNGramMasking(tokenizer)([{"input_ids": []}])
    with pytest.raises(ValueError, match="no texts"):
        DataCollatorForNGramMasking(tokenizer)([])
    for arguments in (
        {"mlm_probability": 0.0},
        {"max_ngram": 0},
        {"mask_replace_prob": 0.9, "random_replace_prob": 0.2},
    ):
        with pytest.raises(ValueError):
            DataCollatorForNGramMasking(tokenizer, **arguments)
    unmasked = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ValueError, match="no mask_token"):
        DataCollatorForNGramMasking(unmasked)
