"""CLEAR attention by FlexAttention, with image tokens in the order of tiles.

In row-major order a block of 128 queries is a strip of the image, whose discs touch many blocks of keys. Here image
tokens are sorted by tiles of 8 x 16, one block each, and come before text and pooled keys, so that a disc touches the
fewest blocks. Which blocks are needed is computed from the rectangles that they cover, without a mask of all pairs.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..call import Refusal
from .call import ClearCall


BLOCK = 128
TILE_HEIGHT, TILE_WIDTH = 8, 16

_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def tile_order(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Raster indices of image tokens, `(height * width,)`, in the order of tiles."""
    # A tensor made in inference mode could not be part of a later backward pass.
    with torch.inference_mode(False):
        index = torch.arange(height * width, device=device)
        row, column = index // width, index % width
        tile = (row // TILE_HEIGHT) * -(-width // TILE_WIDTH) + column // TILE_WIDTH
        return torch.argsort(tile, stable=True)


@lru_cache(maxsize=8)
def clear_block_mask(
    height: int, width: int, text_length: int, radius: int, down_factor: int, device: torch.device
) -> BlockMask:
    """The mask for a sequence of image tokens in the order of tiles, then text, then pooled keys."""
    with torch.inference_mode(False):
        image_length = height * width
        q_len = image_length + text_length
        kv_len = q_len + (image_length // down_factor**2 if down_factor > 1 else 0)
        order = tile_order(height, width, device)
        rows, columns = order // width, order % width

        def mask_mod(batch, head, q_index, kv_index):
            q_is_image, kv_is_image = q_index < image_length, kv_index < image_length
            query, key = q_index.clamp(max=image_length - 1), kv_index.clamp(max=image_length - 1)
            squared_distance = (rows[query] - rows[key]) ** 2 + (columns[query] - columns[key]) ** 2
            near = squared_distance < radius**2
            # Text queries attend to all but pooled keys, image queries to all but distant image keys.
            return torch.where(q_is_image, ~kv_is_image | near, kv_index < q_len)

        needed, full = _needed_blocks(rows, columns, text_length, kv_len, radius)
        return BlockMask.from_kv_blocks(
            *_ordered(needed & ~full),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(q_len, kv_len),
        )


def _needed_blocks(rows, columns, text_length, kv_len, radius) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks `(queries, keys)` have allowed pairs, and which of them have no others; cautious in both."""
    image_length = rows.numel()
    q_len = image_length + text_length
    q_blocks, kv_blocks = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    image_blocks = -(-image_length // BLOCK)
    bounds = []
    for coordinates in (rows, columns):
        padding = coordinates[-1:].expand(image_blocks * BLOCK - image_length)
        blocks = torch.cat([coordinates, padding]).unflatten(0, (image_blocks, BLOCK))
        bounds.append((blocks.amin(dim=1), blocks.amax(dim=1)))
    nearest = sum(torch.clamp(low[:, None] - high, min=low - high[:, None]).clamp(min=0) ** 2 for low, high in bounds)
    farthest = sum(torch.maximum(high[:, None] - low, high - low[:, None]) ** 2 for low, high in bounds)

    needed = torch.ones(q_blocks, kv_blocks, dtype=torch.bool, device=rows.device)
    full = torch.zeros_like(needed)
    # Blocks that contain only image tokens; the last one may also contain text.
    pure = image_length // BLOCK
    needed[:pure, :pure] = nearest[:pure, :pure] < radius**2
    full[:pure, :pure] = farthest[:pure, :pure] < radius**2
    # Image queries attend to all keys that are neither image nor padding; text queries to all that are neither pooled nor padding.
    full[:pure, image_blocks : kv_len // BLOCK] = True
    full[image_blocks : q_len // BLOCK, : q_len // BLOCK] = True
    needed[image_blocks:, -(-q_len // BLOCK) :] = False
    return needed, full & needed


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and indices of the chosen blocks of keys of each block of queries, as FlexAttention takes them."""
    number = blocks.sum(dim=1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return number[None, None], indices[None, None]


def clear_attention_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    radius: int,
    down_factor: int,
    scaling: float,
) -> torch.Tensor:
    """CLEAR attention by FlexAttention.

    Args:
        query: `(batch, heads, text + image, head_dim)`.
        key: `(batch, heads, text + image + pooled, head_dim)`.
        value: of the shape of the keys.
        grid: `(height, width)`.
        radius: of the disc, in tokens; the cells at exactly this distance are outside.
        down_factor: side of the pooled cells, 1 for no pooled keys.
        scaling: of the logits.

    Returns:
        Output `(batch, heads, text + image, head_dim)`.
    """
    length, image_length = query.shape[2], grid[0] * grid[1]
    text_length = length - image_length
    order = tile_order(*grid, query.device)
    sorted_image = order + text_length
    text = torch.arange(text_length, device=query.device)
    pooled = torch.arange(length, key.shape[2], device=query.device)
    q_order = torch.cat([sorted_image, text])
    kv_order = torch.cat([q_order, pooled])
    block_mask = clear_block_mask(*grid, text_length, radius, down_factor, query.device)
    # On the CPU compiling takes longer than most callers wait, and the uncompiled function computes the same.
    attention = flex_attention if query.device.type == "cpu" else _compiled_flex_attention
    output = attention(query[:, :, q_order], key[:, :, kv_order], value[:, :, kv_order], None, block_mask, scaling)
    return output[:, :, torch.argsort(q_order)]


def check_flex(call: ClearCall) -> Refusal | None:
    """Whether FlexAttention supports a call."""
    if call.text_mask is not None:
        return Refusal("'flex' caches its mask and does not support an additional mask of text padding")
    if call.query.device.type == "cpu" and call.needs_gradient:
        return Refusal("FlexAttention has no backward pass on the CPU")
    return None
