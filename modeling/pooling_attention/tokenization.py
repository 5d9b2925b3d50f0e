"""Tokenizers for embedders: each text ends with the end-of-sequence token, and padding is on the left."""

import copy

from tokenizers import processors
from transformers import PreTrainedTokenizerBase


def embedding_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that ends each text with the end-of-sequence token, also one that is cut, and pads left.

    This behaviour is saved with the tokenizer.

    Args:
        tokenizer: a fast tokenizer with an end-of-sequence and a padding token.

    Raises:
        ValueError: if one of these tokens is missing, or the tokenizer is not a fast one.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, whose hidden state is the embedding. Set a token that the "
            "decoder was trained with, such as tokenizer.eos_token = '</s>'."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has no padding token. Set one, for example tokenizer.pad_token = tokenizer.eos_token "
            "(padding is masked)."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it cannot be configured to append a token."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "right"
    if tokenizer("text")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        token = tokenizer.eos_token
        appended = processors.TemplateProcessing(
            single=f"$A:0 {token}:0",
            pair=f"$A:0 {token}:0 $B:1 {token}:1",
            special_tokens=[(token, tokenizer.eos_token_id)],
        )
        backend = tokenizer.backend_tokenizer
        before = [] if backend.post_processor is None else [backend.post_processor]
        backend.post_processor = processors.Sequence([*before, appended])
    return tokenizer
