"""Attention types that are softmax over some of the keys: the allowed pairs of queries and keys.

Each pattern is a function of the indices of queries and keys, integer tensors that broadcast, and returns a boolean tensor.
It is combined with the padding mask by the caller.
"""

from collections.abc import Callable

import torch

from .configuration_wide_attention import WideTransformerConfig


def local(query: torch.Tensor, key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Contiguous blocks that attend only to themselves."""
    return query // block_size == key // block_size


def sparse(query: torch.Tensor, key: torch.Tensor, block_size: int, summary_size: int) -> torch.Tensor:
    """The fixed pattern: earlier tokens of the own block, and the last ones of earlier blocks. The first token sees and is
    seen by all."""
    own = query // block_size == key // block_size
    summary = key % block_size >= block_size - summary_size
    return ((key <= query) & (own | summary)) | (query == 0) | (key == 0)


def longformer(query: torch.Tensor, key: torch.Tensor, window_size: int, num_global_tokens: int) -> torch.Tensor:
    """A window around each token; the first `num_global_tokens` are global."""
    right = window_size // 2
    window = (key - query <= right) & (query - key < window_size - right)
    return window | (query < num_global_tokens) | (key < num_global_tokens)


def bigbird(
    query: torch.Tensor, key: torch.Tensor, random_blocks: torch.Tensor, last_block: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Neighbouring blocks, the first and the last block, which are global, and random ones.

    Args:
        random_blocks: `(blocks, num_random_blocks)`, numbers in [0, 1): where in the sequence the random blocks of each block
            lie. They do not depend on the padding.
        last_block: number of the last block that has a token which is not padding.
    """
    query, key = query // block_size, key // block_size
    near = (query - key).abs() <= 1
    ends = (query == 0) | (key == 0) | (query == last_block) | (key == last_block)
    drawn = (random_blocks[query] * (last_block + 1)[..., None]).long()
    return near | ends | (drawn == key[..., None]).any(-1)


def draw_random_blocks(config: WideTransformerConfig) -> torch.Tensor | None:
    """The random blocks of a configuration with `"bigbird"`, see [`bigbird`], `None` for others."""
    if config.attention_type != "bigbird":
        return None
    block_size, count, seed = (config.attention_kwargs[name] for name in ("block_size", "num_random_blocks", "seed"))
    # For the longest input, so that the pattern of shorter ones is the same.
    blocks = -(-(config.max_position_embeddings + 1) // block_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(blocks, count, generator=generator, device="cpu")


def mask_function(
    config: WideTransformerConfig, mask: torch.Tensor, random_blocks: torch.Tensor | None = None
) -> Callable | None:
    """The pattern of a configuration in the form of transformers' mask functions, `None` if every query attends to every key.

    Args:
        config: configuration of the model.
        mask: `(batch, length)`, false for padding.
        random_blocks: of [`draw_random_blocks`].
    """
    arguments = dict(config.attention_kwargs)
    if config.attention_type == "bigbird":
        block_size, random_blocks = arguments["block_size"], random_blocks.to(mask.device)
        last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).amax(-1) // block_size
        return lambda batch, head, query, key: bigbird(query, key, random_blocks, last[batch], block_size)
    pattern = {"local": local, "sparse": sparse, "longformer": longformer}.get(config.attention_type)
    if pattern is None:
        return None
    return lambda batch, head, query, key: pattern(query, key, **arguments)
