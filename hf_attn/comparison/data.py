"""Training and test data: text, associative recall, and copying over a distance."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..examples.assets import token_blocks


IGNORED = -100
NUM_SYMBOLS = 32
NUM_PAIRS = 4
COPIED = 8


@dataclass
class Corpus:
    """Token ids of the training and test text, and the symbols of the synthetic tasks.

    The vocabulary is that of the tokenizer, followed by `NUM_SYMBOLS` keys, `NUM_SYMBOLS` values, two markers, and one token
    reserved for mechanisms.

    Attributes:
        train, test: int64 tensors `(tokens,)`.
        first_symbol: id of the first key.
    """

    train: torch.Tensor
    test: torch.Tensor
    first_symbol: int

    @classmethod
    def from_texts(cls, train: list[str], test: list[str], tokenizer: PreTrainedTokenizerBase) -> "Corpus":
        """Tokenize the texts; raises `ValueError` if there are fewer than two tokens."""
        parts = (token_blocks(texts, tokenizer, 2).flatten() for texts in (train, test))
        return cls(*parts, first_symbol=len(tokenizer))

    @property
    def vocab_size(self) -> int:
        return self.first_symbol + 2 * NUM_SYMBOLS + 3

    def text(self, batch_size: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random sequences of the training text; all tokens are predicted."""
        input_ids = self._stretches(self.train, batch_size, length, generator)
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def held_out(self, length: int, limit: int) -> torch.Tensor:
        """At most `limit` consecutive sequences `(sequences, length)` of the test text."""
        count = min(limit, len(self.test) // length)
        if count == 0:
            raise ValueError(f"The held-out text has {len(self.test)} tokens, fewer than one sequence of {length}.")
        return self.test[: count * length].view(count, length)

    def recall(self, batch_size: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Key-value pairs within filler text; at the end each key is repeated, and its value has to be predicted."""
        input_ids = self._stretches(self.train, batch_size, length, generator)
        labels = torch.full_like(input_ids, IGNORED)
        asked = length - 2 * NUM_PAIRS
        # Each pair has its own part of the filler, so pairs do not overlap.
        part = asked // NUM_PAIRS
        for row in range(batch_size):
            keys, values = (
                torch.randperm(NUM_SYMBOLS, generator=generator)[:NUM_PAIRS] + self.first_symbol + offset
                for offset in (0, NUM_SYMBOLS)
            )
            places = torch.arange(NUM_PAIRS) * part + torch.randint(part - 1, (NUM_PAIRS,), generator=generator)
            input_ids[row, places], input_ids[row, places + 1] = keys, values
            order = torch.randperm(NUM_PAIRS, generator=generator)
            input_ids[row, asked::2], input_ids[row, asked + 1 :: 2] = keys[order], values[order]
            labels[row, asked + 1 :: 2] = values[order]
        return {"input_ids": input_ids, "labels": labels}

    def copying(self, batch_size: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A string of symbols at the start has to be copied after the filler."""
        input_ids = self._stretches(self.train, batch_size, length, generator)
        labels = torch.full_like(input_ids, IGNORED)
        word = torch.randint(NUM_SYMBOLS, (batch_size, COPIED), generator=generator) + self.first_symbol + NUM_SYMBOLS
        first_mark = self.first_symbol + 2 * NUM_SYMBOLS
        input_ids[:, 0], input_ids[:, 1 : COPIED + 1] = first_mark, word
        input_ids[:, -COPIED - 1], input_ids[:, -COPIED:] = first_mark + 1, word
        labels[:, -COPIED:] = word
        return {"input_ids": input_ids, "labels": labels}

    def training_batch(self, batch_size: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One half text, one quarter of each synthetic task."""
        quarter = max(1, batch_size // 4)
        parts = (
            self.text(max(1, batch_size - 2 * quarter), length, generator),
            self.recall(quarter, length, generator),
            self.copying(quarter, length, generator),
        )
        return {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}

    @staticmethod
    def _stretches(tokens: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        if len(tokens) <= length:
            raise ValueError(f"The training text has {len(tokens)} tokens, fewer than one sequence of {length}.")
        starts = torch.randint(len(tokens) - length, (count, 1), generator=generator)
        return tokens[starts + torch.arange(length)]
