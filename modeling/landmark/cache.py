# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Random-access memory: a cache of blocks from which each query retrieves those whose landmarks it scores highest.

The position of a block changes with every step and every choice, so keys are kept rotated for their offsets within their
blocks only. Rows of a batch are kept apart: each holds its own tokens from slot 0 on, without padding, so that rows may
differ in length.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_landmark import LandmarkConfig
from .store import GROWTH, BlockStore, grown, longest


Retrieval = Literal["per_token_and_head", "max_over_tokens", "max_over_heads", "max_over_tokens_and_heads"]

#: dimensions of `(batch, heads, tokens, blocks)` that share a choice
RETRIEVALS = {
    "per_token_and_head": (),
    "max_over_tokens": (2,),
    "max_over_heads": (1,),
    "max_over_tokens_and_heads": (1, 2),
}

#: kinds of rotary embedding whose frequencies depend on the length of the input
CHANGING_ROTARY_EMBEDDINGS = ("dynamic", "longrope")


@dataclass(frozen=True)
class Destination:
    """Where the tokens of an input are stored.

    Attributes:
        row, column: of the tokens that are stored, in the input.
        slot: slot of each of them.
        landmark_row, landmark_column, landmark_slot: the same for the landmarks among them; the slots are of blocks.
        needed: number of slots that have to be there.
    """

    row: torch.Tensor
    column: torch.Tensor
    slot: torch.Tensor
    landmark_row: torch.Tensor
    landmark_column: torch.Tensor
    landmark_slot: torch.Tensor
    needed: int

    @classmethod
    def of(cls, slots: torch.Tensor, needed: int, block_size: int) -> "Destination":
        """From the slots of the tokens of an input, `(batch, length)`; -1 for what is not stored."""
        row, column = (slots >= 0).nonzero(as_tuple=True)
        slot = slots[row, column]
        closes = slot % block_size == block_size - 1
        return cls(row, column, slot, row[closes], column[closes], slot[closes] // block_size, needed)


class LandmarkCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, and once more the keys of the landmarks.

    Attributes:
        keys, values: by slots, `(batch, kv_heads, slots, head_dim)`, keys with the rotary embedding of their offsets within
            their blocks; in pages on the CPU if they are offloaded.
        landmark_keys: `(batch, kv_heads, slots of blocks, head_dim)`, on the device of the model.
        retrieved: for each step that retrieved, the numbers of the blocks in ascending order,
            `(batch, heads or 1, queries or 1, top_k)`; -1 where a row has fewer blocks.
    """

    is_croppable = True

    def __init__(self, cache: "LandmarkCache"):
        super().__init__()
        self.cache = cache
        self.landmark_keys: torch.Tensor | None = None
        self.retrieved: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        paged = self.cache.offload_to_cpu
        store = torch.device("cpu") if paged else self.device
        self.keys = BlockStore(key_states, self.cache.block_size, store, paged)
        self.values = BlockStore(value_states, self.cache.block_size, store, paged)
        self.landmark_keys = torch.empty_like(key_states[:, :, :0])
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        destination: Destination | None = None,
        *args,
        **kwargs,
    ) -> tuple[BlockStore, BlockStore]:
        """Store new tokens.

        Args:
            key_states, value_states: `(batch, kv_heads, length, head_dim)`, keys rotated for their offsets.
            destination: destination of each token.

        Raises:
            ValueError: if there is none: the model is no landmark model.
        """
        if not isinstance(destination, Destination):
            raise ValueError(
                "A LandmarkCache is only for landmark models, which pass the positions of the landmarks. Use "
                "transformers' DynamicCache, or the cache of the model."
            )
        block = self.cache.block_size
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.landmark_keys.shape[2] * block
        if destination.needed > slots:
            slots = max(destination.needed, min(int(GROWTH * slots), self.cache.max_slots))
            blocks = -(-slots // block)
            self.landmark_keys = grown(self.landmark_keys, blocks)
            if not self.cache.offload_to_cpu:
                # One after the other, so that only one old buffer is in memory together with its successor.
                self.keys.reserve(blocks * block)
                self.values.reserve(blocks * block)
        if self.cache.offload_to_cpu:
            self.keys.reserve(destination.needed)
            self.values.reserve(destination.needed)

        key_states, value_states = key_states.detach(), value_states.detach()
        row, column, slot = destination.row, destination.column, destination.slot
        self.keys.write(row, slot, key_states[row, :, column])
        self.values.write(row, slot, value_states[row, :, column])
        if len(destination.landmark_row):
            landmarks = key_states[destination.landmark_row, :, destination.landmark_column]
            self.landmark_keys[destination.landmark_row, :, destination.landmark_slot] = landmarks
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.cache.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.landmark_keys = None
        self.is_initialized = False
        self.retrieved = []

    def offload(self) -> None:
        raise NotImplementedError(
            "The layers of a LandmarkCache cannot be offloaded. To keep its blocks in CPU memory, create it with "
            "LandmarkCache(..., offload_to_cpu=True)."
        )

    def _select(self, function) -> None:
        if self.is_initialized:
            self.keys.apply(function)
            self.values.apply(function)
            self.landmark_keys = function(self.landmark_keys)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda buffer: buffer[indices.to(buffer.device)])


def _shape(config: LandmarkConfig) -> dict[str, int]:
    """Settings shared by a model and its cache."""
    names = ("mem_freq", "num_hidden_layers", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name) for name in names}


class LandmarkCache(Cache):
    """Memory of a [`LandmarkForCausalLM`].

    Args:
        config: configuration of the model.
        top_k: how many blocks a query retrieves; all of them if not given, which is the same as attending to everything.
        retrieval: who shares a choice. `"per_token_and_head"`: nobody. `"max_over_tokens"`: the tokens of a chunk, by the
            largest softmax over the landmarks. `"max_over_heads"`: the heads of a token, likewise.
            `"max_over_tokens_and_heads"`: all heads of all tokens of a chunk.
        max_chunk_length: longest piece of the input, landmarks included, that is processed at once. With `top_k` and
            without this, it is what `config.train_context_length` leaves beside the retrieved blocks.
        offload_to_cpu: keep the blocks in CPU memory, in pages that are never copied, and move only those that are retrieved
            to the device of the model.
        max_blocks: number of blocks to remember; older ones are forgotten. All if not given. Needs `top_k`.
        record_retrieved: keep the numbers of the retrieved blocks, see [`LandmarkCache.retrieved_blocks`].

    Raises:
        ValueError: for numbers below 1, an unknown `retrieval`, `max_blocks` below `top_k`, or, with `top_k` or
            `max_chunk_length` or a second input, a model whose rotary embedding changes with the length of the input.
    """

    def __init__(
        self,
        config: LandmarkConfig,
        top_k: int | None = None,
        retrieval: Retrieval = "per_token_and_head",
        max_chunk_length: int | None = None,
        offload_to_cpu: bool = False,
        max_blocks: int | None = None,
        record_retrieved: bool = False,
    ):
        if not isinstance(config, LandmarkConfig):
            raise ValueError(
                f"A LandmarkCache needs the configuration of a landmark model, got {type(config).__name__}."
            )
        for name, number in (("top_k", top_k), ("max_chunk_length", max_chunk_length), ("max_blocks", max_blocks)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {number}.")
        if retrieval not in RETRIEVALS:
            raise ValueError(f"retrieval must be one of {', '.join(RETRIEVALS)}, got {retrieval!r}.")
        if max_blocks is not None and (top_k is None or max_blocks < top_k):
            raise ValueError(f"max_blocks ({max_blocks}) must be at least top_k ({top_k}), and top_k must be set.")
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        self.changing_rotary_embedding = rope_type if rope_type in CHANGING_ROTARY_EMBEDDINGS else None
        if top_k is not None or max_chunk_length is not None:
            self._check_rotary_embedding()
        self.block_size = config.block_size
        self.shape = _shape(config)
        self.top_k = top_k
        self.retrieval = retrieval
        self.offload_to_cpu = offload_to_cpu
        self.max_blocks = max_blocks
        self.record_retrieved = record_retrieved
        if max_chunk_length is None and top_k is not None:
            context = config.train_context_length
            room = context - context % self.block_size - (top_k + 1) * self.block_size
            max_chunk_length = max(room, self.block_size)
        self.max_chunk_length = max_chunk_length
        #: columns of the caller's inputs, padding included; hidden landmarks are not counted
        self.seen_tokens = 0
        #: whether the model inserted the landmarks; `None` before the first input
        self.inserts_landmarks: bool | None = None
        #: `(batch,)`, tokens of each row, landmarks included
        self.lengths: torch.Tensor | None = None
        #: `(batch, tokens)`, only without `top_k`
        self.is_landmark: torch.Tensor | None = None
        super().__init__(layers=[LandmarkCacheLayer(self) for _ in range(config.num_hidden_layers)])

    def new(self, config: LandmarkConfig) -> "LandmarkCache":
        """An empty cache with the same settings that records nothing."""
        settings = ("top_k", "retrieval", "max_chunk_length", "offload_to_cpu", "max_blocks")
        return LandmarkCache(config, **{name: getattr(self, name) for name in settings})

    @property
    def shares_choice(self) -> tuple[int, ...]:
        """Dimensions of `(batch, heads, tokens, blocks)` that share a choice of blocks."""
        return RETRIEVALS[self.retrieval]

    @property
    def max_slots(self) -> int:
        """Most slots that are ever needed: the blocks to remember and the one that is being filled."""
        return 2**62 if self.max_blocks is None else (self.max_blocks + 1) * self.block_size

    @property
    def retrieved_blocks(self) -> list[list[torch.Tensor]]:
        """For each layer and each step that retrieved, the numbers of the blocks in ascending order,
        `(batch, heads or 1, queries or 1, top_k)`. Block `n` holds regular tokens `n * mem_freq` to
        `(n + 1) * mem_freq - 1` of the row, padding not counted."""
        if not self.record_retrieved:
            raise ValueError("The retrieved blocks were not kept: create the cache with record_retrieved=True.")
        return [layer.retrieved for layer in self.layers]

    def _check_rotary_embedding(self) -> None:
        if self.changing_rotary_embedding is not None:
            raise ValueError(
                f"The rotary embedding of the model ({self.changing_rotary_embedding!r}) changes with the input "
                "length, but cached keys do not. Use other rope_parameters in the configuration, or pass "
                "use_cache=False."
            )

    def start(self, config: LandmarkConfig, batch_size: int, device: torch.device, inserts_landmarks: bool) -> None:
        """Called before an input: checks that it continues the stored sequence.

        Raises:
            ValueError: for a model of another shape, another batch size, or landmarks that are inserted in one input and not
                in another.
        """
        if (model := _shape(config)) != self.shape:
            different = [name for name in model if model[name] != self.shape[name]]
            raise ValueError(
                "The LandmarkCache belongs to another model: it was made for "
                f"{', '.join(f'{name}={self.shape[name]}' for name in different)}, but this model has "
                f"{', '.join(f'{name}={model[name]}' for name in different)}. Create one with "
                "LandmarkCache(model.config)."
            )
        if self.lengths is None:
            self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
            self.is_landmark = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
            self.inserts_landmarks = inserts_landmarks
        else:
            self._check_rotary_embedding()
        if self.lengths.shape[0] != batch_size:
            raise ValueError(f"The cache has {self.lengths.shape[0]} rows, but the input has {batch_size}.")
        if self.inserts_landmarks != inserts_landmarks:
            raise ValueError(
                f"This cache was filled with insert_landmarks={self.inserts_landmarks} and must be continued with the "
                "same setting (`generate` uses insert_landmarks=True)."
            )

    def append_tokens(self, valid: torch.Tensor, is_landmark: torch.Tensor) -> None:
        """Called after an input `(batch, length)` has been stored in all layers."""
        self.lengths = self.lengths + valid.sum(-1)
        if self.top_k is None:
            width = longest(self.lengths)
            flags = torch.zeros(len(valid), width, dtype=torch.bool, device=valid.device)
            flags[:, : self.is_landmark.shape[1]] = self.is_landmark
            row, column = valid.nonzero(as_tuple=True)
            place = (self.lengths - valid.sum(-1))[:, None] + valid.cumsum(-1) - 1
            flags[row, place[row, column]] = is_landmark[row, column]
            self.is_landmark = flags

    def regular_tokens(self) -> torch.Tensor:
        """`(batch,)`: tokens of each row without the landmarks that the model inserted."""
        return self.lengths - self.lengths // self.block_size

    def reset(self) -> None:
        super().reset()
        self.seen_tokens, self.inserts_landmarks, self.lengths, self.is_landmark = 0, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every row, with the landmarks among them that the model inserted.

        Args:
            tokens_to_remove: minus their number.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop needs a negative number, minus the number of tokens to remove; got {tokens_to_remove}."
            )
        if self.lengths is None or tokens_to_remove == 0:
            return
        if self.max_blocks is not None:
            raise ValueError("A cache with max_blocks, which drops old blocks, cannot be cropped.")
        if self.inserts_landmarks:
            regular = (self.regular_tokens() + tokens_to_remove).clamp(min=0)
            self.lengths = regular + regular // (self.block_size - 1)
        else:
            self.lengths = (self.lengths + tokens_to_remove).clamp(min=0)
        self.seen_tokens = max(self.seen_tokens + tokens_to_remove, 0)
        if self.top_k is None:
            width = longest(self.lengths)
            kept = torch.arange(width, device=self.lengths.device) < self.lengths[:, None]
            self.is_landmark = self.is_landmark[:, :width] & kept

    def _select(self, function) -> None:
        if self.lengths is not None:
            self.lengths, self.is_landmark = function(self.lengths), function(self.is_landmark)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda rows: rows[indices.to(rows.device)])


__all__ = ["LandmarkCache"]
