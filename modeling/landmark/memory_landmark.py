# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Attention to the memory: which blocks a query retrieves, where they are put, and one grouped softmax over them and the
tokens at hand (arXiv 2305.16300, section 3.3; "stingy" positions).

With k blocks retrieved from N, the last k blocks are at their true places, and every older one is at the place of the
(k+1)-th last. So there are k+1 places for k blocks, whatever N is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.models.llama.modeling_llama import rotate_half

from hf_attn.attention.landmark import grouped_softmax

from .cache_landmark import LandmarkCache


#: Largest number of elements of retrieved keys that are gathered at once.
GATHERED_ELEMENTS = 2**24


@dataclass(frozen=True)
class RetrievalStep:
    """Blocks and places of one step.

    Attributes:
        top_k: number of blocks that each query retrieves.
        counts: `(batch,)`, number of complete blocks of each row.
        newest: `(batch,)`, first of the blocks that are at their true places.
        numbers: `(batch, used slots of blocks)`, number of the block in each slot; -1 for none.
        rows_by_slots: rows with the same number of filled slots, and that number.
        landmark_embeddings: cosines and sines `(batch, used slots of blocks, head_dim)` of the landmarks for the choice.
        place_embeddings: cosines and sines `(batch, top_k + 1, block_size, head_dim)` of the places.
        recent_slots: `(batch, recent)`, slots of the tokens of the block that is being filled.
        recent_valid: `(batch, recent)`.
        recent_embeddings: cosines and sines `(batch, recent, head_dim)`.
    """

    top_k: int
    counts: torch.Tensor
    newest: torch.Tensor
    numbers: torch.Tensor
    rows_by_slots: tuple[tuple[torch.Tensor, int], ...]
    landmark_embeddings: tuple[torch.Tensor, torch.Tensor]
    place_embeddings: tuple[torch.Tensor, torch.Tensor]
    recent_slots: torch.Tensor
    recent_valid: torch.Tensor
    recent_embeddings: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MemoryStep:
    """What all layers have in common in one step with a cache.

    Attributes:
        cache: the cache, as it was before the step.
        lengths: `(batch,)`, tokens of each row in it.
        past_length: the largest of them, if everything is attended to; 0 with retrieval.
        valid: `(batch, length)`, which tokens of the input are no padding.
        slots: `(batch, length)`, where they are stored; -1 for those that are not.
        needed: number of slots that have to be there after the step.
        mask: boolean `(batch, 1, length, past_length + length)`; none for plain causality or for a single query that sees
            everything.
        is_landmark: `(batch, past_length + length)`.
        past_embeddings: cosines and sines `(batch, past_length, head_dim)` of the tokens in the cache.
        retrieval: how to retrieve, if there are more blocks than a query retrieves.
        all_blocks: `(batch, 1, 1, blocks)`, the numbers of the blocks if all of them are read for want of more; -1 where a
            row has fewer.
    """

    cache: LandmarkCache
    lengths: torch.Tensor
    past_length: int
    valid: torch.Tensor
    slots: torch.Tensor
    needed: int
    mask: torch.Tensor | None
    is_landmark: torch.Tensor
    past_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    retrieval: RetrievalStep | None
    all_blocks: torch.Tensor | None

    @property
    def is_first(self) -> bool:
        """Whether nothing is in the cache."""
        return self.past_length == 0 and self.retrieval is None

    def past(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys (not rotated) and values in the cache, `(batch, kv_heads, past_length, head_dim)`."""
        layer = self.cache.layers[layer_idx]
        return tuple(states[:, :, : self.past_length].to(layer.device) for states in (layer.keys, layer.values))

    def store(self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put the keys (not rotated) and values of the input into the cache."""
        layer = self.cache.layers[layer_idx]
        layer.update(key_states, value_states, self.slots, self.needed)
        if self.cache.record_retrieved and self.all_blocks is not None:
            layer.retrieved.append(self.all_blocks)


def begin_step(
    cache: LandmarkCache,
    valid: torch.Tensor,
    is_landmark: torch.Tensor,
    rotary_emb: Callable,
    states: torch.Tensor,
) -> MemoryStep:
    """Plan a step with a cache.

    Args:
        cache: the cache.
        valid: `(batch, length)`, which tokens of the input are no padding.
        is_landmark: `(batch, length)`.
        rotary_emb: the rotary embedding of the model.
        states: a tensor of the dtype and device of the model.

    Raises:
        ValueError: if blocks are to be retrieved and the landmarks are not at the ends of blocks.
    """
    lengths, block = cache.lengths, cache.block_size
    length = valid.shape[1]
    positions = lengths[:, None] + valid.cumsum(-1) - 1
    if cache.top_k is not None and bool(((positions % block == block - 1) != is_landmark)[valid].any()):
        raise ValueError(
            f"Retrieval (top_k={cache.top_k}) needs a landmark after every {block - 1} regular tokens of each row and nowhere "
            "else. Insert them with `insert_landmarks=True`."
        )
    after = lengths + valid.sum(-1)
    kept = valid & (positions >= (after - cache.max_slots)[:, None])
    slots = torch.where(kept, positions % cache.max_slots, -1)
    needed = min(int(after.max()), cache.max_slots)

    blocks = 0 if cache.top_k is None else int(lengths.max()) // block
    retrieval, all_blocks, past_length, past_embeddings = None, None, 0, None
    if cache.top_k is not None and blocks > cache.top_k:
        retrieval = _begin_retrieval(cache, rotary_emb, states)
    else:
        past_length = int(lengths.max())
        if blocks > 0:
            numbers = torch.arange(blocks, device=lengths.device) - blocks + (lengths // block)[:, None]
            all_blocks = numbers.clamp(min=-1)[:, None, None]

    steps = torch.arange(length, device=valid.device)
    mask = (steps <= steps[:, None]) & valid[:, None, None, :]
    if past_length > 0:
        past_positions = torch.arange(past_length, device=valid.device).expand(len(valid), -1)
        past_embeddings = rotary_emb(states, position_ids=past_positions)
        past_valid = past_positions < lengths[:, None]
        past_landmarks = cache.is_landmark
        if cache.top_k is not None:
            past_landmarks = past_valid & (past_positions % block == block - 1)
        is_landmark = torch.cat([past_landmarks, is_landmark & valid], dim=1)
        mask = torch.cat([past_valid[:, None, None, :].expand(-1, -1, length, -1), mask], dim=-1)
    elif retrieval is None and bool(valid.all()):
        mask = None
    if mask is not None and length == 1 and retrieval is None and bool(mask.all()):
        mask = None
    return MemoryStep(
        cache, lengths, past_length, valid, slots, needed, mask, is_landmark, past_embeddings, retrieval, all_blocks
    )


def _begin_retrieval(cache: LandmarkCache, rotary_emb: Callable, states: torch.Tensor) -> RetrievalStep:
    block, top_k = cache.block_size, cache.top_k
    lengths = cache.lengths
    counts = lengths // block
    slots = cache.layers[0].landmark_keys.shape[2]
    slot = torch.arange(min(slots, int(counts.max())), device=lengths.device)
    # The newest block in a slot; before the cache is full that is the block of the slot's number.
    numbers = counts[:, None] - 1 - (counts[:, None] - 1 - slot) % slots
    if cache.max_blocks is not None:
        # The slot that the block at hand is being filled into is not memory any more.
        numbers = numbers.masked_fill(numbers < (counts - cache.max_blocks)[:, None], -1)
    numbers = numbers.clamp(min=-1)

    retrieved = counts.clamp(max=top_k)
    newest = counts - retrieved
    first_place = (counts - retrieved - 1) * block

    def embeddings(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tables = rotary_emb(states, position_ids=positions.flatten(1))
        return tuple(table.view(*positions.shape, table.shape[-1]) for table in tables)

    place = (numbers - newest[:, None] + 1).clamp(min=0)
    offsets = torch.arange((top_k + 1) * block, device=lengths.device).view(top_k + 1, block)
    # Each row chooses from the slots that it has filled. The others would take part in how `topk` decides between equal
    # scores, as those of the first layer are for all old blocks, and rows would depend on each other.
    filled = counts.clamp(max=slots)
    rows_by_slots = tuple(
        ((filled == number).nonzero()[:, 0], number) for number in filled.unique().tolist() if number > 0
    )
    recent = int((lengths % block).max())
    recent_positions = (counts * block)[:, None] + torch.arange(recent, device=lengths.device)
    return RetrievalStep(
        top_k=top_k,
        counts=counts,
        newest=newest,
        numbers=numbers,
        rows_by_slots=rows_by_slots,
        landmark_embeddings=embeddings(first_place[:, None] + place * block + block - 1),
        place_embeddings=embeddings(first_place[:, None, None] + offsets),
        recent_slots=recent_positions % (slots * block),
        recent_valid=recent_positions < lengths[:, None],
        recent_embeddings=embeddings(recent_positions),
    )


def _rotate(states: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = embeddings
    return states * cos + rotate_half(states) * sin


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
    chosen = _choose(step, layer, query, scaling)
    if step.cache.record_retrieved:
        layer.retrieved.append(chosen.numbers)

    row = torch.arange(len(query), device=query.device)[:, None]
    store_row, store_slots = row.to(layer.keys.device), plan.recent_slots.to(layer.keys.device)
    recent_key, recent_value = (
        states[store_row, :, store_slots].transpose(1, 2).to(query.device) for states in (layer.keys, layer.values)
    )
    cos, sin = plan.recent_embeddings
    recent_key = _rotate(recent_key, (cos[:, None], sin[:, None]))
    local_key, local_value = torch.cat([recent_key, key], dim=2), torch.cat([recent_value, value], dim=2)
    length, recent = query.shape[2], recent_key.shape[2]
    allowed = torch.cat([plan.recent_valid[:, None, None].expand(-1, -1, length, -1), step.mask], dim=-1)
    flags = torch.cat([torch.zeros_like(plan.recent_valid), is_landmark & step.valid], dim=-1)

    elements = query.shape[0] * query.shape[1] * plan.top_k * step.cache.block_size * query.shape[3]
    rows = max(1, GATHERED_ELEMENTS // elements) if chosen.slots.shape[2] > 1 else length
    pieces = [
        _attend(
            step, layer, chosen.of_queries(piece), query[:, :, piece], local_key, local_value,
            allowed[:, :, piece], flags, slice(recent + piece.start, recent + piece.stop), scaling,
        )
        for piece in (slice(start, min(start + rows, length)) for start in range(0, length, rows))
    ]  # fmt: skip
    output, weights = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
    return output.transpose(1, 2).contiguous(), weights


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

    def of_queries(self, piece: slice) -> "Chosen":
        if self.slots.shape[2] == 1:
            return self
        return Chosen(self.slots[:, :, piece], self.numbers[:, :, piece], self.places[:, :, piece])


def _choose(step: MemoryStep, layer, query: torch.Tensor, scaling: float) -> Chosen:
    plan = step.retrieval
    cos, sin = plan.landmark_embeddings
    landmarks = _rotate(layer.landmark_keys[:, :, : cos.shape[1]], (cos[:, None], sin[:, None]))
    batch, heads, length, _ = query.shape
    scores = query.reshape(batch, landmarks.shape[1], -1, query.shape[-1]) @ landmarks.transpose(-1, -2)
    scores = scores.view(batch, heads, length, -1).float() * scaling
    scores = scores.masked_fill((plan.numbers < 0)[:, None, None, :], float("-inf"))
    if step.cache.retrieval != "per_token_and_head":
        scores = scores.softmax(-1)
        # Padding chooses nothing. A row without blocks has no numbers here.
        scores = scores.nan_to_num().masked_fill(~step.valid[:, None, :, None], 0.0)
        scores = scores.amax(2 if step.cache.retrieval == "max_over_tokens" else 1, keepdim=True)
        scores = scores.masked_fill((plan.numbers < 0)[:, None, None, :], -1.0)

    slots = torch.full((*scores.shape[:3], plan.top_k), -1, device=scores.device)
    for rows, filled in plan.rows_by_slots:
        found = scores[rows, ..., :filled].topk(min(plan.top_k, filled), dim=-1).indices
        slots[rows, ..., : found.shape[-1]] = found
    numbers = plan.numbers[:, None, None].expand(*slots.shape[:3], -1).gather(-1, slots.clamp(min=0))
    numbers = numbers.masked_fill(slots < 0, -1)
    slots = slots.clamp(min=0)
    numbers, order = numbers.sort(dim=-1)
    slots = slots.gather(-1, order)
    missing = (numbers < 0).sum(-1, keepdim=True)
    rank = torch.arange(plan.top_k, device=slots.device) - missing
    places = (rank + (numbers >= plan.newest[:, None, None, None]).long()).clamp(min=0)
    return Chosen(slots, numbers, places)


def _attend(
    step: MemoryStep, layer, chosen: Chosen, query, local_key, local_value, allowed, flags, at: slice, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the queries at places `at` of the local tokens."""
    plan, block = step.retrieval, step.cache.block_size
    batch, heads, length, head_dim = query.shape
    kv_heads = local_key.shape[1]

    row = torch.arange(batch, device=query.device)[:, None, None, None]
    kv_head = (torch.arange(heads, device=query.device) // (heads // kv_heads))[None, :, None, None]
    slots = chosen.slots.expand(-1, heads, -1, -1)
    store = layer.keys.device
    where = tuple(index.to(store) for index in (row, kv_head, slots))
    block_key, block_value = (
        states.unflatten(2, (-1, block))[where].to(query.device) for states in (layer.keys, layer.values)
    )
    tables = tuple(table[row, chosen.places] for table in plan.place_embeddings)
    block_key, block_value = _rotate(block_key, tables).flatten(3, 4), block_value.flatten(3, 4)

    # A choice that is shared by the queries has one set of keys for all of them.
    sets = block_key.shape[2]
    by_set = query.unflatten(2, (sets, length // sets))
    block_scores = (by_set @ block_key.transpose(-1, -2)).flatten(2, 3)
    local_scores = query.reshape(batch, kv_heads, -1, head_dim) @ local_key.transpose(-1, -2)
    scores = torch.cat([block_scores, local_scores.view(batch, heads, length, -1)], dim=-1)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scaling

    retrieved = (chosen.numbers >= 0).expand(-1, heads, length, -1).repeat_interleave(block, dim=-1)
    ends = (torch.arange(retrieved.shape[-1], device=query.device) % block == block - 1).expand(batch, -1)
    local_block = flags.long().cumsum(-1) - flags.long() + plan.top_k
    weights = grouped_softmax(
        scores,
        torch.cat([ends, flags], dim=-1),
        torch.cat([retrieved, allowed.expand(-1, heads, -1, -1)], dim=-1),
        local_block[:, at],
    ).to(query.dtype)

    split = retrieved.shape[-1]
    from_blocks = (weights[..., :split].unflatten(2, (sets, length // sets)) @ block_value).flatten(2, 3)
    from_local = weights[..., split:].reshape(batch, kv_heads, -1, weights.shape[-1] - split) @ local_value
    return from_blocks + from_local.view(batch, heads, length, -1), weights
