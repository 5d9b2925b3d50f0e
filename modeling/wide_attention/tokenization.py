"""Tokenizers of the paper's tasks: bytes, and the symbols of ListOps. Both are ordinary fast tokenizers of transformers, which
`AutoTokenizer` loads with or without this package."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


PAD = "<pad>"


def _fast(tokenizer: Tokenizer, max_length: int, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        model_max_length=max_length,
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
        # The characters "<pad>" in a text are not padding.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


def byte_tokenizer(max_length: int = 1000) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the bytes of the text in UTF-8: the id is the byte plus 1, and 0 is padding.

    Args:
        max_length: longest text in bytes when it is called with `truncation=True`; the benchmark's are 1000 for
            classification and 4000 for matching.
    """
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length must be a positive integer, got {max_length!r}.")
    vocabulary = {character: byte + 1 for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab={PAD: 0, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, max_length)


def _byte_characters() -> list[str]:
    """The character that represents each byte in byte-level vocabularies: printable ones for themselves, the others for those
    from 256 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def symbol_tokenizer(symbols: Sequence[str], max_length: int = 2000) -> PreTrainedTokenizerFast:
    """A tokenizer of texts that are known symbols between spaces, such as ListOps; 0 is padding, 1 an unknown symbol.

    Args:
        symbols: the vocabulary, in order.
        max_length: longest text in symbols when it is called with `truncation=True`.
    """
    unknown = "<unk>"
    vocabulary = {symbol: index for index, symbol in enumerate([PAD, unknown, *symbols])}
    if len(vocabulary) != len(symbols) + 2:
        raise ValueError(f"symbols must be unique and must not contain {PAD} or {unknown}, got {list(symbols)}.")
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer, max_length, unk_token=unknown)
