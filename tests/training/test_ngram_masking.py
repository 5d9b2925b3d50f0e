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


# Three words are chosen of 300. Runs of 1, 2, 3 words have the probabilities 6/11, 3/11, 2/11 (proportional to 1/n): the three lie
# alone if the first two runs are single words, together if the first run has three, and else two of them are neighbours.
@pytest.mark.parametrize(("max_ngram", "expected"), [(1, (1, 0, 0)), (3, (36 / 121, 63 / 121, 22 / 121))])
def test_lengths_of_runs(tokenizer, max_ngram, expected):
    torch.manual_seed(0)
    num_words, count = 300, 1000
    text = {"input_ids": tokenizer("fox")["input_ids"][1:2] * num_words, "word_ids": list(range(num_words))}
    collator = DataCollatorForNGramMasking(tokenizer, mlm_probability=3 / num_words, max_ngram=max_ngram)
    chosen = collator([text] * count)["labels"] != -100
    assert (chosen.sum(1) == 3).all()
    neighbours = (chosen[:, 1:] & chosen[:, :-1]).sum(1)
    shares = torch.bincount(neighbours, minlength=3) / count
    expected = torch.tensor(expected)
    # Four standard deviations, and the runs that touch by chance: each of three pairs of words with a probability of 2 / 300.
    tolerance = 4 * (expected * (1 - expected) / count).sqrt() + 3 * 2 / num_words
    # Of single words, the number that touch by chance varies as well.
    tolerance += 4 * (3 * 2 / num_words / count) ** 0.5
    assert ((shares - expected).abs() <= tolerance).all(), shares


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
