# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Attention to the memory: each query retrieves the blocks whose landmarks have the highest scores, and one grouped softmax goes
over them and the tokens at hand (arXiv 2305.16300, section 3.3).

A retrieved block is one entry of the query's softmax, with the score of its landmark, and the value of the softmax within
the block.

Blocks tie whose scores differ from that of the last retrieved one by at most [`TIE_TOLERANCE`] of the largest score (by
magnitude), or by one unit in the last place of the dtype if that is more. Of them the newer ones are retrieved, so that
rounding, which depends on threads and devices, does not decide. In the first layer all old blocks tie: their landmarks have
one key.
"""

from dataclasses import dataclass

import torch

from hf_attn.attention.landmark import grouped_softmax

from .cache import LandmarkCacheLayer
from .memory import MemoryStep, rotate


#: Relative difference up to which scores tie.
TIE_TOLERANCE = 1e-5

#: Largest number of elements of retrieved keys that are gathered at once.
GATHERED_ELEMENTS = 2**22

#: How many queries read a block that was fetched: the mean number of its readers within these bounds.
SMALLEST_TILE, LARGEST_TILE = 4, 64


def attend_to_memory(
    step: MemoryStep,
    layer_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_landmark: torch.Tensor,
    scaling: float,
    output_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retrieve blocks, and attend to them, to the block that is being filled and to the input.

    Args:
        step: the plan of this step.
        layer_idx: layer of the cache.
        query, key, value: of the input, `(batch, heads or kv_heads, length, head_dim)`, with rotary embedding.
        is_landmark: `(batch, length)`.
        scaling: factor of the scores.
        output_weights: return the weights too.

    Returns:
        Output `(batch, length, heads, head_dim)` and, on request, weights `(batch, heads, length, keys)` over the retrieved
        blocks from old to new, the block that is being filled, and the input.
    """
    layer, plan = step.cache.layers[layer_idx], step.retrieval
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    # What the query is to the keys of a block at each place: `(batch, heads, length, top_k + 1, head_dim)`.
    at_places = rotate(query.unsqueeze(3), plan.places, inverse=True)
    chosen = _choose(step, layer, at_places, scaling)
    if step.cache.record_retrieved:
        layer.retrieved.append(chosen.numbers)
    gates, inside, block_values = _read_blocks(layer, chosen, at_places, scaling, output_weights)

    row, kv_head = (torch.arange(count, device=query.device) for count in (batch, kv_heads))
    recent = (row[:, None, None], kv_head[None, :, None], plan.recent_slots[:, None])
    recent_key, recent_value = (states.read_tokens(*recent).to(query.device) for states in (layer.keys, layer.values))
    local_key = torch.cat([rotate(recent_key, plan.recent_place), key], dim=2)
    local_value = torch.cat([recent_value, value], dim=2)
    local_scores = query.reshape(batch, kv_heads, -1, head_dim) @ local_key.transpose(-1, -2)
    local_scores = local_scores.view(batch, heads, length, -1).to(gates.dtype) * scaling

    gate_weights, local_weights = _weights(step, chosen, gates, local_scores, is_landmark)
    gate_weights, local_weights = gate_weights.to(query.dtype), local_weights.to(query.dtype)
    from_blocks = (gate_weights.unsqueeze(3) @ block_values).squeeze(3)
    from_local = local_weights.reshape(batch, kv_heads, -1, local_value.shape[2]) @ local_value
    output = from_blocks + from_local.view(batch, heads, length, -1)
    if not output_weights:
        return output.transpose(1, 2), None
    landmarks = torch.zeros_like(gate_weights).unsqueeze(-1)
    block_weights = torch.cat([gate_weights.unsqueeze(-1) * inside, landmarks], dim=-1).flatten(3)
    return output.transpose(1, 2), torch.cat([block_weights, local_weights], dim=-1)


@dataclass(frozen=True)
class Chosen:
    """Retrieved blocks from old to new, each `(batch, heads or 1, queries or 1, top_k)`.

    Attributes:
        slots: where they are stored.
        numbers: their numbers, -1 where a row has fewer blocks.
        places: their destinations.
    """

    slots: torch.Tensor
    numbers: torch.Tensor
    places: torch.Tensor


def _choose(step: MemoryStep, layer: LandmarkCacheLayer, at_places: torch.Tensor, scaling: float) -> Chosen:
    """The blocks with the highest scores of their landmarks."""
    plan = step.retrieval
    batch, heads, length, _, head_dim = at_places.shape
    used = plan.numbers.shape[1]
    landmarks = layer.landmark_keys[:, :, :used]
    kv_heads = landmarks.shape[1]
    # As if all blocks were at the first place, and then the newest ones at their own.
    scores = at_places[..., 0, :].reshape(batch, kv_heads, -1, head_dim) @ landmarks.transpose(-1, -2)
    scores = scores.view(batch, heads, length, used)
    row = torch.arange(batch, device=scores.device)[:, None]
    newest = landmarks[row, :, plan.newest_slots.clamp(max=used - 1)].transpose(1, 2)
    newest = newest.repeat_interleave(heads // kv_heads, dim=1).unsqueeze(2)
    newest_scores = (at_places[..., 1:, :] * newest).sum(-1)
    target = plan.newest_slots[:, None, None].expand_as(newest_scores)
    if plan.is_complete:
        scores = scores.scatter(-1, target, newest_scores)
    else:
        # One column more, for the newest blocks that a row does not have.
        scores = torch.cat([scores, scores[..., :1]], dim=-1).scatter(-1, target, newest_scores)[..., :used]
        scores = scores.masked_fill((plan.numbers < 0)[:, None, None, :], float("-inf"))

    if step.cache.shares_choice:
        scores = (scores.float() * scaling).softmax(-1)
        # Padding chooses nothing. A row without blocks has no numbers here.
        scores = scores.nan_to_num().masked_fill(~step.valid[:, None, :, None], 0.0)
        scores = scores.amax(step.cache.shares_choice, keepdim=True)
        scores = scores.masked_fill((plan.numbers < 0)[:, None, None, :], -1.0)

    block_numbers = plan.numbers[:, None, None]
    slots = _best(scores, block_numbers, plan.top_k)
    numbers = block_numbers.expand(*slots.shape[:3], -1).gather(-1, slots)
    numbers, order = numbers.sort(dim=-1)
    slots = slots.gather(-1, order)
    missing = (numbers < 0).sum(-1, keepdim=True)
    rank = torch.arange(plan.top_k, device=slots.device) - missing
    places = (rank + (numbers >= plan.newest[:, None, None, None]).long()).clamp(min=0)
    return Chosen(slots, numbers, places)


def _best(scores: torch.Tensor, numbers: torch.Tensor, top_k: int) -> torch.Tensor:
    """Slots of the blocks with the highest scores, of those that tie the newer ones.

    Args:
        scores: `(batch, heads or 1, queries or 1, slots)`; those of missing blocks are the lowest.
        numbers: `(batch, 1, 1, slots)`, numbers of the blocks; -1 for missing ones.
        top_k: how many, at most the number of slots.

    Returns:
        `(batch, heads or 1, queries or 1, top_k)`, in no particular order.
    """
    last = scores.topk(top_k, dim=-1).values[..., -1:]
    relative = max(TIE_TOLERANCE, torch.finfo(scores.dtype).eps)
    tolerance = relative * scores.masked_fill(numbers < 0, 0.0).abs().amax(-1, keepdim=True)
    # There are fewer than top_k blocks above the last one and its equals.
    above = numbers + numbers.amax().clamp(min=0) + 1
    rank = torch.where(scores > last + tolerance, above, numbers)
    return rank.masked_fill(scores < last - tolerance, -2).topk(top_k, dim=-1).indices


def _read_blocks(
    layer: LandmarkCacheLayer, chosen: Chosen, at_places: torch.Tensor, scaling: float, output_weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Read the chosen blocks.

    Returns:
        Scores of their landmarks `(batch, heads, length, top_k)`, weights within each block
        `(batch, heads, length, top_k, mem_freq)` on request, and values by these weights
        `(batch, heads, length, top_k, head_dim)`.
    """
    _, heads, length, _, head_dim = at_places.shape
    places = chosen.places.expand(-1, heads, length, -1)
    query = at_places.gather(3, places.unsqueeze(-1).expand(-1, -1, -1, -1, head_dim))

    if chosen.slots.shape[2] == 1:
        return _read_same(layer, chosen.slots, query, scaling)
    return _read_in_tiles(layer, chosen.slots.expand(-1, heads, -1, -1), query, scaling, output_weights)


def _read_same(
    layer: LandmarkCacheLayer, slots: torch.Tensor, query: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read blocks that all queries have in common.

    Args:
        slots: `(batch, heads or 1, 1, top_k)`.
        query: what each query is to each of the blocks, `(batch, heads, length, top_k, head_dim)`.
    """
    batch, heads = query.shape[:2]
    row, head = (torch.arange(count, device=slots.device) for count in (batch, heads))
    where = (row[:, None, None], (head // (heads // layer.keys.shape[1]))[None, :, None], slots[:, :, 0])
    keys, values = (states.read_blocks(*where).to(query.device) for states in (layer.keys, layer.values))
    parts = _attend_within(query.transpose(2, 3), keys, values, scaling)
    return tuple(part.transpose(2, 3) for part in parts)


def _read_in_tiles(
    layer: LandmarkCacheLayer, slots: torch.Tensor, query: torch.Tensor, scaling: float, output_weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Read blocks of which each query has its own.

    Queries that read the same block are put together in tiles, so that a block is fetched once for each of its tiles and not
    for each query.

    Args:
        slots: `(batch, heads, length, top_k)`.
        query: `(batch, heads, length, top_k, head_dim)`.
    """
    batch, heads, length, top_k, head_dim = query.shape
    kv_heads, block = layer.keys.shape[1], layer.keys.block_size
    num_slots = layer.landmark_keys.shape[2]
    row, head = (torch.arange(count, device=slots.device) for count in (batch, heads))
    kv_row = row[:, None] * kv_heads + head // (heads // kv_heads)
    block_of = (kv_row[:, :, None, None] * num_slots + slots).flatten()

    order = block_of.argsort()
    blocks, readers = block_of[order].unique_consecutive(return_counts=True)
    tile = min(max(len(order) // len(blocks), SMALLEST_TILE), LARGEST_TILE)
    tiles = (readers + tile - 1) // tile
    # Index of the first reader of each block among all readers, and among the slots of the tiles.
    first_reader, first_place = readers.cumsum(0) - readers, (tiles.cumsum(0) - tiles) * tile
    rank = torch.arange(len(order), device=slots.device)
    place = torch.empty_like(order)
    place[order] = rank + (first_place - first_reader).repeat_interleave(readers)
    tile_block = blocks.repeat_interleave(tiles)

    tiled = query.new_zeros(len(tile_block) * tile, head_dim)
    tiled[place] = query.flatten(0, 3)
    parts = []
    pieces = zip(
        *(
            t.split(max(1, GATHERED_ELEMENTS // (block * head_dim)))
            for t in (tile_block, tiled.unflatten(0, (-1, tile)))
        ),
        strict=True,
    )
    for numbers, queries in pieces:
        kv_rows = numbers // num_slots
        where = (kv_rows // kv_heads, kv_rows % kv_heads, numbers % num_slots)
        keys, values = (states.read_blocks(*where).to(query.device) for states in (layer.keys, layer.values))
        gates, inside, read = _attend_within(queries, keys, values, scaling)
        parts.append((gates, inside if output_weights else None, read))

    def joined(part: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
        if part[0] is None:
            return None
        return torch.cat(part).flatten(0, 1)[place].unflatten(0, (batch, heads, length, top_k))

    return tuple(joined(part) for part in zip(*parts, strict=True))


def _attend_within(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The landmark's scores, the weights within the block and the values by them, for queries `(..., queries, head_dim)` of
    blocks `(..., block_size, head_dim)`."""
    scores = (query @ keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    inside = scores[..., :-1].softmax(-1).to(query.dtype)
    return scores[..., -1], inside, inside @ values[..., :-1, :]


def _weights(
    step: MemoryStep, chosen: Chosen, gates: torch.Tensor, local_scores: torch.Tensor, is_landmark: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the retrieved blocks `(batch, heads, length, top_k)` and of the local tokens."""
    plan, top_k = step.retrieval, step.retrieval.top_k
    batch, heads, length, _ = local_scores.shape
    allowed = torch.cat([plan.recent_valid[:, None, None].expand(-1, -1, length, -1), step.mask], dim=-1)
    flags = torch.cat([torch.zeros_like(plan.recent_valid), is_landmark & step.valid], dim=-1)
    if plan.is_one_block and plan.is_complete:
        local_scores = local_scores.masked_fill(~allowed | flags[:, None, None], float("-inf"))
        weights = torch.cat([gates, local_scores], dim=-1).softmax(-1)
        return weights[..., :top_k], weights[..., top_k:]
    if plan.is_complete and plan.is_aligned:
        return _block_by_block(gates, local_scores, step.cache.block_size)

    # To the softmax each retrieved block is one regular token that a landmark closes.
    scores = torch.cat([torch.stack([torch.zeros_like(gates), gates], dim=-1).flatten(-2), local_scores], dim=-1)
    there = (chosen.numbers >= 0).expand(-1, heads, length, -1).repeat_interleave(2, dim=-1)
    closes = torch.arange(2 * top_k, device=scores.device).expand(batch, -1) % 2 == 1
    local_block = flags.long().cumsum(-1) - flags.long() + top_k
    weights = grouped_softmax(
        scores,
        torch.cat([closes, flags], dim=-1),
        torch.cat([there, allowed.expand(-1, heads, -1, -1)], dim=-1),
        local_block[:, -length:],
    )
    return weights[..., : 2 * top_k : 2], weights[..., 2 * top_k :]


def _block_by_block(gates: torch.Tensor, local_scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for local tokens without padding, of which the first begins a block: in each block the queries have the same
    groups.

    Args:
        gates: scores of the landmarks of the retrieved blocks, `(batch, heads, length, top_k)`.
        local_scores: `(batch, heads, length, keys)`; the last keys are the input.
    """
    length, keys = local_scores.shape[2:]
    top_k, first = gates.shape[-1], keys - length
    gate_weights, local_weights = torch.empty_like(gates), torch.zeros_like(local_scores)
    position = torch.arange(keys, device=gates.device)
    for start in range(first - first % block, keys, block):
        end, earlier = min(start + block, keys), start // block
        rows = slice(max(start, first) - first, end - first)
        own = position[start:end]
        seen = (own <= position[first:][rows, None]) & (own % block != block - 1)
        own_scores = local_scores[:, :, rows, start:end].masked_fill(~seen, float("-inf"))
        blocks = local_scores[:, :, rows, :start].unflatten(-1, (earlier, block))
        weights = torch.cat([gates[:, :, rows], blocks[..., -1], own_scores], dim=-1).softmax(-1)
        gate_weights[:, :, rows], by_block, own_weights = weights.split([top_k, earlier, end - start], dim=-1)
        inside = local_weights[:, :, rows, :start].unflatten(-1, (earlier, block))
        inside[..., :-1] = blocks[..., :-1].softmax(-1) * by_block.unsqueeze(-1)
        local_weights[:, :, rows, start:end] = own_weights
    return gate_weights, local_weights
