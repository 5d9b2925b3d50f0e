"""Perplexity of a language model by the length of the context that it has."""

import math
from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel


def perplexity_of(loss: float) -> float:
    """Perplexity of a mean loss in nats per token; infinite if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def perplexity_by_context(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    lengths: Sequence[int],
    make_cache: Callable[[], Cache] | None = None,
    piece: int = 512,
    progress: bool = True,
    **forward_arguments,
) -> dict[int, float]:
    """Cut a text into segments of each length, and measure the perplexity of each segment with an empty cache before it.

    The first token of a segment has no context and is not scored. As many tokens as the longest length divides are used, so
    that lengths that divide each other are measured on the same text.

    Args:
        model: a causal language model, in eval mode.
        tokens: ids `(length,)`.
        lengths: of the segments.
        make_cache: makes the cache of a segment; transformers' `DynamicCache` if not given.
        piece: a segment is processed in chunks of this many tokens, so that the model never holds the logits of a long
            one.
        progress: whether to show a progress bar.
        forward_arguments: for `forward`, such as `insert_landmarks=True` of a model with landmarks.

    Returns:
        Perplexity by length.

    Raises:
        ValueError: for a length below 2, or one that the text is too short for.
    """
    if not lengths or piece < 1:
        raise ValueError(f"Pass at least one length, and chunks of at least 1 token; got {list(lengths)} and {piece}.")
    if min(lengths) < 2:
        raise ValueError(f"A segment needs at least 2 tokens, got lengths {list(lengths)}.")
    longest = max(lengths)
    if longest > len(tokens):
        raise ValueError(f"The text has {len(tokens)} tokens, fewer than one segment of {longest}.")
    tokens = tokens[: len(tokens) // longest * longest].to(model.device)
    perplexities = {}
    total = sum(len(tokens) // length * length for length in lengths)
    with tqdm(total=total, desc="Perplexity", unit="token", disable=not progress) as bar:
        for length in lengths:
            loss, count = 0.0, 0
            for segment in tokens.unfold(0, length, length):
                cache = DynamicCache(config=model.config) if make_cache is None else make_cache()
                for start in range(0, length, piece):
                    ids = segment[start : start + piece]
                    logits = model(ids[None], past_key_values=cache, use_cache=True, **forward_arguments).logits[0]
                    targets = segment[start + 1 : start + 1 + len(ids)]
                    loss += torch.nn.functional.cross_entropy(
                        logits[: len(targets)].float(), targets, reduction="sum"
                    ).item()
                    count += len(targets)
                    bar.update(len(ids))
            perplexities[length] = perplexity_of(loss / count)
    return perplexities
