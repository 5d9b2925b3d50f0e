# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The plan of a step with memory, which all layers share: the slots of new tokens, and the positions at which blocks are read
(arXiv 2305.16300, section 3.3; "stingy" positions).

With k blocks retrieved from N, the last k blocks are at their true places, and every older one is at the place of the
(k+1)-th last. So there are k+1 places for k blocks, for any N.

The rotary embedding of a key is split: the part for its offset within its block never changes and is applied when it is
stored; the part for the place of the block is applied when it is read, to the keys or, inversely, to the query.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.llama.modeling_llama import rotate_half

from .cache import Destination, LandmarkCache
from .store import longest


#: cosines and sines, which broadcast to the states
Tables = tuple[torch.Tensor, torch.Tensor]


def rotate(states: torch.Tensor, tables: Tables, inverse: bool = False) -> torch.Tensor:
    """Rotary embedding."""
    cos, sin = tables
    # Under autocast the tables are float32 and the states are not.
    return (states * cos + rotate_half(states) * (-sin if inverse else sin)).to(states.dtype)


@dataclass(frozen=True)
class RetrievalStep:
    """Blocks and places of one step.

    Attributes:
        top_k: number of blocks that each query retrieves.
        newest: `(batch,)`, first of the blocks that are at their true places.
        newest_slots: `(batch, top_k)`, slots of these blocks; one after the last used slot where a row has fewer.
        numbers: `(batch, used slots of blocks)`, number of the block in each slot; -1 for none.
        places: of the blocks, `(batch, 1, 1, top_k + 1, head_dim)`.
        recent_slots: `(batch, recent)`, slots of the tokens of the block that is being filled.
        recent_valid: `(batch, recent)`.
        recent_place: of the block that is being filled, `(batch, 1, 1, head_dim)`.
        is_complete: whether every row has a block in each slot, and no fewer blocks than are retrieved.
        is_one_block: whether no query is behind a landmark of the input.
        is_aligned: whether the rows have equally many tokens in the block that is being filled, and no padding.
    """

    top_k: int
    newest: torch.Tensor
    newest_slots: torch.Tensor
    numbers: torch.Tensor
    places: Tables
    recent_slots: torch.Tensor
    recent_valid: torch.Tensor
    recent_place: Tables
    is_complete: bool
    is_one_block: bool
    is_aligned: bool


@dataclass(frozen=True)
class MemoryStep:
    """Values shared by all layers in one step with a cache.

    Attributes:
        cache: the cache, as it was before the step.
        lengths: `(batch,)`, tokens of each row in it.
        past_length: the largest of them, if everything is attended to; 0 with retrieval.
        valid: `(batch, length)`, which tokens of the input are not padding.
        destination: where the input is stored.
        offsets: of the input within its blocks, `(batch, 1, length, head_dim)`.
        mask: boolean `(batch, 1, length, past_length + length)`; none for plain causality or for a single query that sees
            everything.
        is_landmark: `(batch, past_length + length)`.
        past_places: of the blocks of the tokens in the cache, `(batch, 1, past_length, head_dim)`.
        retrieval: how to retrieve, if there are more blocks than a query retrieves.
        all_blocks: `(batch, 1, 1, blocks)`, the numbers of the blocks if all of them are read for want of more; -1 where a
            row has fewer.
    """

    cache: LandmarkCache
    lengths: torch.Tensor
    past_length: int
    valid: torch.Tensor
    destination: Destination
    offsets: Tables
    mask: torch.Tensor | None
    is_landmark: torch.Tensor
    past_places: Tables | None
    retrieval: RetrievalStep | None
    all_blocks: torch.Tensor | None

    @property
    def is_first(self) -> bool:
        """Whether nothing is in the cache."""
        return self.past_length == 0 and self.retrieval is None

    def past(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys (rotated) and values in the cache, `(batch, kv_heads, past_length, head_dim)`."""
        layer = self.cache.layers[layer_idx]
        keys, values = (states.first(self.past_length).to(layer.device) for states in (layer.keys, layer.values))
        return rotate(keys, self.past_places), values

    def store(self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put the keys (not rotated) and values of the input into the cache."""
        layer = self.cache.layers[layer_idx]
        layer.update(rotate(key_states, self.offsets), value_states, self.destination)
        if self.cache.record_retrieved and self.all_blocks is not None:
            layer.retrieved.append(self.all_blocks)


def begin_step(
    cache: LandmarkCache,
    valid: torch.Tensor,
    is_landmark: torch.Tensor,
    rotary_emb: nn.Module,
    states: torch.Tensor,
) -> MemoryStep:
    """Plan a step with a cache.

    Args:
        cache: the cache.
        valid: `(batch, length)`, which tokens of the input are not padding.
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
            f"Retrieval (top_k={cache.top_k}) needs a landmark after every {block - 1} regular tokens of each row, "
            "and nowhere else. Insert them with `insert_landmarks=True`."
        )
    after = lengths + valid.sum(-1)
    kept = valid & (positions >= (after - cache.max_slots)[:, None])
    slots = torch.where(kept, positions % cache.max_slots, -1)
    destination = Destination.of(slots, min(longest(after), cache.max_slots), block)
    # The place of a block brings the factor that some rotary embeddings have.
    cos, sin = (table[:, None] / rotary_emb.attention_scaling for table in rotary_emb(states, positions % block))

    blocks = 0 if cache.top_k is None else longest(lengths) // block
    retrieval, all_blocks, past_length, past_places = None, None, 0, None
    if cache.top_k is not None and blocks > cache.top_k:
        retrieval = _begin_retrieval(cache, valid, rotary_emb, states, is_landmark)
    else:
        past_length = longest(lengths)
        if blocks > 0:
            numbers = torch.arange(blocks, device=lengths.device) - blocks + (lengths // block)[:, None]
            all_blocks = numbers.clamp(min=-1)[:, None, None]

    steps = torch.arange(length, device=valid.device)
    mask = (steps <= steps[:, None]) & valid[:, None, None, :]
    if past_length > 0:
        past_positions = torch.arange(past_length, device=valid.device).expand(len(valid), -1)
        past_places = tuple(table[:, None] for table in rotary_emb(states, past_positions // block * block))
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
        cache, lengths, past_length, valid, destination, (cos, sin), mask, is_landmark, past_places, retrieval, all_blocks
    )  # fmt: skip


def _begin_retrieval(
    cache: LandmarkCache, valid: torch.Tensor, rotary_emb: nn.Module, states: torch.Tensor, is_landmark: torch.Tensor
) -> RetrievalStep:
    block, top_k = cache.block_size, cache.top_k
    lengths = cache.lengths
    counts = lengths // block
    slots = cache.layers[0].landmark_keys.shape[2]
    slot = torch.arange(min(slots, longest(counts)), device=lengths.device)
    # The newest block in a slot; before the cache is full that is the block of the slot's number.
    numbers = counts[:, None] - 1 - (counts[:, None] - 1 - slot) % slots
    if cache.max_blocks is not None:
        # The slot of the block that is being filled is no longer part of the memory.
        numbers = numbers.masked_fill(numbers < (counts - cache.max_blocks)[:, None], -1)
    numbers = numbers.clamp(min=-1)

    retrieved = counts.clamp(max=top_k)
    newest = counts - retrieved
    newest_numbers = newest[:, None] + torch.arange(top_k, device=lengths.device)
    newest_slots = torch.where(newest_numbers < counts[:, None], newest_numbers % slots, len(slot))
    place_starts = (newest[:, None] - 1 + torch.arange(top_k + 1, device=lengths.device)) * block

    recent = longest(lengths % block)
    recent_positions = (counts * block)[:, None] + torch.arange(recent, device=lengths.device)
    return RetrievalStep(
        top_k=top_k,
        newest=newest,
        newest_slots=newest_slots,
        numbers=numbers,
        places=tuple(table[:, None, None] for table in rotary_emb(states, place_starts)),
        recent_slots=recent_positions % (slots * block),
        recent_valid=recent_positions < lengths[:, None],
        recent_place=tuple(table[:, None] for table in rotary_emb(states, (counts * block)[:, None])),
        is_complete=bool((numbers >= 0).all()) and bool((counts >= top_k).all()),
        is_one_block=not is_landmark[:, :-1].any(),
        is_aligned=bool(valid.all()) and bool((lengths % block == recent).all()),
    )
