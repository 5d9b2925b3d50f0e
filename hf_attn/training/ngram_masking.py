"""Masking of whole words and runs of words, as DeBERTa (arXiv 2006.03654) was trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase


#: marks of the first token of a word in tokenizers
_WORD_STARTS = ("\u2581", "\u0120")
_CONTINUATION = "##"


@dataclass
class DataCollatorForNGramMasking:
    """Pads texts and masks whole words in runs of one to `max_ngram`, a run of n with a probability proportional to 1/n.

    Args:
        tokenizer: has a mask token and a padding token. Its tokens show where words start (SentencePiece, byte-level BPE
            and WordPiece do), or the features say so as `word_ids`, one number or None for each token.
        mlm_probability: share of the tokens of a text that is to be predicted; at least one is.
        max_ngram: words in the longest run; 1 masks single words, as BERT with whole-word masking.
        mask_replace_prob: share of the chosen tokens that become the mask token.
        random_replace_prob: share that becomes a random token; the rest is not changed.
        pad_to_multiple_of: pad to a multiple of this length.

    Returns, called with a list of features: `input_ids`, `attention_mask` and `labels`, which are -100 where nothing is to be
    predicted.

    Raises:
        ValueError: for shares that are none, and tokenizers without mask or padding token or without marks of words.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    max_ngram: int = 3
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, got {self.mlm_probability}.")
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {self.max_ngram}.")
        if min(self.mask_replace_prob, self.random_replace_prob) < 0 or (
            self.mask_replace_prob + self.random_replace_prob > 1
        ):
            raise ValueError(
                "mask_replace_prob and random_replace_prob must not be negative, and their sum must be at most 1."
            )
        for name in ("mask_token", "pad_token"):
            if getattr(self.tokenizer, name) is None:
                raise ValueError(
                    f"The tokenizer has no {name}. Add one: tokenizer.add_special_tokens({{'{name}': "
                    f"'[{name[:-6].upper()}]'}}), and resize the embeddings of the model."
                )
        vocabulary = self.tokenizer.get_vocab()
        self._starts_word: set[int] | None = {
            index for token, index in vocabulary.items() if token.startswith(_WORD_STARTS)
        }
        if not self._starts_word:
            self._starts_word = {index for token, index in vocabulary.items() if not token.startswith(_CONTINUATION)}
            if len(self._starts_word) == len(vocabulary):
                self._starts_word = None

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        if not features:
            raise ValueError("There are no texts in this batch.")
        texts = [list(feature["input_ids"]) for feature in features]
        labels = []
        for feature, text in zip(features, texts, strict=True):
            if not text:
                raise ValueError("A text of this batch has length 0; leave empty texts out.")
            words = self._words(text, feature.get("word_ids"))
            targets = [-100] * len(text)
            for position in self._choose(words):
                targets[position] = text[position]
                draw = torch.rand(()).item()
                if draw < self.mask_replace_prob:
                    text[position] = self.tokenizer.mask_token_id
                elif draw < self.mask_replace_prob + self.random_replace_prob:
                    text[position] = int(torch.randint(len(self.tokenizer), ()))
            labels.append(targets)
        batch = self.tokenizer.pad(
            {"input_ids": texts},
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
            return_attention_mask=True,
        )
        length = batch["input_ids"].shape[1]
        before = self.tokenizer.padding_side == "left"
        padded = []
        for targets in labels:
            filling = [-100] * (length - len(targets))
            padded.append(filling + targets if before else targets + filling)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor(padded),
        }

    def _words(self, text: list[int], word_ids: Sequence[int | None] | None) -> list[list[int]]:
        """Positions of the tokens of each word; special tokens belong to none."""
        if word_ids is None and self._starts_word is None:
            raise ValueError(
                "The tokens of this tokenizer do not show where words start. Add `word_ids` to the features "
                "(`tokenizer(...).word_ids()`), or use DataCollatorForLanguageModeling."
            )
        special = set(self.tokenizer.all_special_ids)
        words: list[list[int]] = []
        last = None
        for position, token in enumerate(text):
            if token in special or (word_ids is not None and word_ids[position] is None):
                last = None
                continue
            current = word_ids[position] if word_ids is not None else token
            continues = current == last if word_ids is not None else token not in self._starts_word
            if words and last is not None and continues:
                words[-1].append(position)
            else:
                words.append([position])
            last = current
        return words

    def _choose(self, words: list[list[int]]) -> list[int]:
        """Positions to predict."""
        wanted = max(1, round(self.mlm_probability * sum(map(len, words))))
        weights = 1 / torch.arange(1, self.max_ngram + 1, dtype=torch.float)
        chosen: list[int] = []
        taken = [False] * len(words)
        for start in torch.randperm(len(words)).tolist():
            if len(chosen) >= wanted:
                break
            size = 1 + int(torch.multinomial(weights, 1))
            for word in range(start, min(start + size, len(words))):
                # A run ends where another one starts, and before it exceeds the share; a first word is masked whole.
                if taken[word] or (chosen and len(chosen) + len(words[word]) > wanted):
                    break
                taken[word] = True
                chosen += words[word]
        return chosen
