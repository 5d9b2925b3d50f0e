# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Where landmarks go: after every `mem_freq` regular tokens of a row, padding not counted."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .configuration_landmark import LandmarkConfig
from .store import longest


#: text of the landmark token
LANDMARK_TOKEN = "<landmark>"


def add_landmark_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<landmark>` a special token of a tokenizer, if it is not one yet.

    Returns:
        Its id.
    """
    if LANDMARK_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [LANDMARK_TOKEN]}, replace_extra_special_tokens=False
        )
    return tokenizer.convert_tokens_to_ids(LANDMARK_TOKEN)


def check_landmark_token(tokenizer: PreTrainedTokenizerBase, config: LandmarkConfig) -> None:
    """Check that a tokenizer has the landmark of a model.

    Raises:
        ValueError: if it has none, or one with another id.
    """
    if LANDMARK_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer has no {LANDMARK_TOKEN}, which is token {config.landmark_token_id} of the model. Load the "
            "tokenizer that was saved with the model, or call add_landmark_token(tokenizer)."
        )
    found = tokenizer.convert_tokens_to_ids(LANDMARK_TOKEN)
    if found != config.landmark_token_id:
        raise ValueError(
            f"{LANDMARK_TOKEN} is token {found} of the tokenizer but {config.landmark_token_id} of the model. Load "
            "the tokenizer that was saved with the model."
        )


@dataclass(frozen=True)
class Insertion:
    """How landmarks are inserted into the rows of a batch. The result is aligned to the left, without the padding.

    Attributes:
        source: `(batch, length)`, the column that a token comes from; -1 for landmarks and fill.
        valid: `(batch, length)`, false for fill at the end of shorter rows.
        is_landmark: `(batch, length)`.
        place: `(batch, columns)`, where each token of the input has gone; 0 for padding.
        completes: `(batch, columns)`, whether a landmark follows it.
    """

    source: torch.Tensor
    valid: torch.Tensor
    is_landmark: torch.Tensor
    place: torch.Tensor
    completes: torch.Tensor

    @classmethod
    def of(cls, valid: torch.Tensor, mem_freq: int, seen: torch.Tensor | None = None) -> "Insertion":
        """Args:
        valid: boolean `(batch, columns)`, which tokens are not padding.
        mem_freq: number of regular tokens of a block.
        seen: `(batch,)`, number of regular tokens of each row before these.
        """
        if seen is None:
            seen = torch.zeros(len(valid), dtype=torch.long, device=valid.device)
        rank = valid.cumsum(-1)
        count = seen[:, None] + rank
        landmarks = count // mem_freq - (seen // mem_freq)[:, None]
        completes = valid & (count % mem_freq == 0)
        place = (rank - 1 + landmarks - completes.long()).masked_fill(~valid, 0)

        lengths = valid.sum(-1) + completes.sum(-1)
        shape = (len(valid), longest(lengths))
        source = torch.full(shape, -1, device=valid.device)
        row, column = valid.nonzero(as_tuple=True)
        source[row, place[row, column]] = column
        is_landmark = torch.zeros(shape, dtype=torch.bool, device=valid.device)
        row, column = completes.nonzero(as_tuple=True)
        is_landmark[row, place[row, column] + 1] = True
        filled = torch.arange(shape[1], device=valid.device) < lengths[:, None]
        return cls(source, filled, is_landmark, place, completes)

    def apply(self, tokens: torch.Tensor, landmark: torch.Tensor | int) -> torch.Tensor:
        """Insert.

        Args:
            tokens: ids `(batch, columns)` or embeddings `(batch, columns, width)`.
            landmark: id or embedding of the landmark; the fill is the same.
        """
        if not isinstance(landmark, torch.Tensor):
            landmark = torch.tensor(landmark, dtype=tokens.dtype, device=tokens.device)
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
        from_input = (self.source >= 0).view(*self.source.shape, *(1,) * (tokens.dim() - 2))
        return torch.where(from_input, tokens[row, self.source.clamp(min=0)], landmark)

    def read(self, states: torch.Tensor, at_landmarks: bool) -> torch.Tensor:
        """The states `(batch, length, width)` of the tokens of the input, `(batch, columns, width)`.

        Args:
            states: of the result.
            at_landmarks: for a token that a landmark follows, take the landmark's.
        """
        row = torch.arange(len(states), device=states.device)[:, None]
        return states[row, self.place + self.completes.long() if at_landmarks else self.place]


__all__ = ["LANDMARK_TOKEN", "Insertion", "add_landmark_token", "check_landmark_token"]
