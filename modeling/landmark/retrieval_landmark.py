# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Attention to the memory: each query retrieves the blocks whose landmarks it scores highest, and one grouped softmax goes
over them and the tokens at hand (arXiv 2305.16300, section 3.3).

A retrieved block is one entry of the query's softmax, with the score of its landmark, and the value of the softmax within
the block.
"""

from dataclasses import dataclass

import torch

from hf_attn.attention.landmark import grouped_softmax

from .cache_landmark import LandmarkCacheLayer
from .memory_landmark import MemoryStep, rotate


#: Largest number of elements of retrieved keys that are gathered at once.
GATHERED_ELEMENTS = 2**24


def attend_to_memory(
    step: MemoryStep,
    layer_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_landmark: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Retrieve blocks, and attend to them, to the block that is being filled and to the input.

    Args:
        step: the plan of this step.
        layer_idx: layer of the cache.
        query, key, value: of the input, `(batch, heads or kv_heads, length, head_dim)`, with rotary embedding.
        is_landmark: `(batch, length)`.
        scaling: factor of the scores.

    Returns:
        Output `(batch, length, heads, head_dim)` and weights `(batch, heads, length, keys)` over the retrieved blocks from
        old to new, the block that is being filled, and the input.
    """
    layer, plan = step.cache.layers[layer_idx], step.retrieval
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    # What the query is to the keys of a block at each place: `(batch, heads, length, top_k + 1, head_dim)`.
    at_places = rotate(query.unsqueeze(3), plan.places, inverse=True)
    chosen = _choose(step, layer, at_places, scaling)
    if step.cache.record_retrieved:
        layer.retrieved.append(chosen.numbers)
    gates, inside, block_values = _read_blocks(step, layer, chosen, at_places, scaling)

    row = torch.arange(batch, device=layer.keys.device)[:, None]
    recent_slots = plan.recent_slots.to(layer.keys.device)
    recent_key, recent_value = (
        states[row, :, recent_slots].transpose(1, 2).to(query.device) for states in (layer.keys, layer.values)
    )
    local_key = torch.cat([rotate(recent_key, plan.recent_place), key], dim=2)
    local_value = torch.cat([recent_value, value], dim=2)
    local_scores = query.reshape(batch, kv_heads, -1, head_dim) @ local_key.transpose(-1, -2)
    local_scores = local_scores.view(batch, heads, length, -1).to(gates.dtype) * scaling

    gate_weights, local_weights = _weights(step, chosen, gates, local_scores, is_landmark)
    gate_weights, local_weights = gate_weights.to(query.dtype), local_weights.to(query.dtype)
    from_blocks = (gate_weights.unsqueeze(3) @ block_values).squeeze(3)
    from_local = local_weights.reshape(batch, kv_heads, -1, local_value.shape[2]) @ local_value
    output = from_blocks + from_local.view(batch, heads, length, -1)
    landmarks = torch.zeros_like(gate_weights).unsqueeze(-1)
    block_weights = torch.cat([gate_weights.unsqueeze(-1) * inside, landmarks], dim=-1).flatten(3)
    return output.transpose(1, 2), torch.cat([block_weights, local_weights], dim=-1)


@dataclass(frozen=True)
class Chosen:
    """Retrieved blocks from old to new, each `(batch, heads or 1, queries or 1, top_k)`.

    Attributes:
        slots: where they are stored.
        numbers: their numbers, -1 where a row has fewer blocks.
        places: where they are put.
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

    if plan.is_complete and len(plan.rows_by_slots) == 1:
        slots = scores.topk(plan.top_k, dim=-1).indices
    else:
        slots = torch.full((*scores.shape[:3], plan.top_k), -1, device=scores.device)
        for rows, filled in plan.rows_by_slots:
            found = scores[rows, ..., :filled].topk(min(plan.top_k, filled), dim=-1).indices
            slots[rows, ..., : found.shape[-1]] = found
    numbers = plan.numbers[:, None, None].expand(*slots.shape[:3], -1).gather(-1, slots.clamp(min=0))
    numbers = numbers.masked_fill(slots < 0, -1)
    numbers, order = numbers.sort(dim=-1)
    slots = slots.clamp(min=0).gather(-1, order)
    missing = (numbers < 0).sum(-1, keepdim=True)
    rank = torch.arange(plan.top_k, device=slots.device) - missing
    places = (rank + (numbers >= plan.newest[:, None, None, None]).long()).clamp(min=0)
    return Chosen(slots, numbers, places)


def _read_blocks(
    step: MemoryStep, layer: LandmarkCacheLayer, chosen: Chosen, at_places: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the chosen blocks.

    Returns:
        Scores of their landmarks `(batch, heads, length, top_k)`, weights within each block
        `(batch, heads, length, top_k, mem_freq)`, and values by these weights `(batch, heads, length, top_k, head_dim)`.
    """
    batch, heads, length, _, head_dim = at_places.shape
    block, top_k = step.cache.block_size, chosen.slots.shape[-1]
    places = chosen.places.expand(-1, heads, length, -1)
    query = at_places.gather(3, places.unsqueeze(-1).expand(-1, -1, -1, -1, head_dim))

    sets = chosen.slots.shape[2]
    elements = batch * heads * top_k * block * head_dim
    rows = length if sets == 1 else max(1, GATHERED_ELEMENTS // elements)
    parts = [
        _gather_and_read(layer, chosen.slots[:, :, start : start + rows], query[:, :, start : start + rows], block, scaling)
        for start in range(0, length, rows)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True))


def _gather_and_read(
    layer: LandmarkCacheLayer, slots: torch.Tensor, query: torch.Tensor, block: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length = query.shape[:3]
    kv_heads, store = layer.keys.shape[1], layer.keys.device
    row = torch.arange(batch, device=store)[:, None, None, None]
    kv_head = (torch.arange(heads, device=store) // (heads // kv_heads))[None, :, None, None]
    where = (row, kv_head, slots.expand(-1, heads, -1, -1).to(store))
    keys, values = (states.unflatten(2, (-1, block))[where].to(query.device) for states in (layer.keys, layer.values))

    # A choice that is shared by the queries has one set of blocks for all of them.
    sets = slots.shape[2]
    by_set = query.unflatten(2, (sets, length // sets)).transpose(3, 4)
    scores = (by_set @ keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    inside = scores[..., :-1].softmax(-1)
    read = inside.to(query.dtype) @ values[..., :-1, :]
    return tuple(part.transpose(3, 4).flatten(2, 3) for part in (scores[..., -1], inside.to(query.dtype), read))


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
