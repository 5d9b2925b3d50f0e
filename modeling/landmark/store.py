# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Storage of the states of a cache's blocks: one buffer, or pages if it should grow without being copied."""

import torch


#: How much larger than needed a full buffer becomes, so that not every token copies it.
GROWTH = 1.25

#: Blocks of a page.
PAGE_BLOCKS = 16


def longest(lengths: torch.Tensor) -> int:
    """The largest of the lengths of rows, 0 of an empty batch."""
    return int(lengths.max()) if len(lengths) else 0


def grown(buffer: torch.Tensor, slots: int) -> torch.Tensor:
    """The buffer with more slots in its dimension 2; the old ones keep their content."""
    larger = buffer.new_zeros(*buffer.shape[:2], slots, *buffer.shape[3:])
    larger[:, :, : buffer.shape[2]] = buffer
    return larger


class BlockStore:
    """Keys or values of one layer by slots, `(batch, kv_heads, slots, head_dim)`.

    Args:
        states: like what will be stored, `(batch, kv_heads, any length, head_dim)`.
        block_size: tokens of a block; a block is never split between pages.
        device: where to store.
        paged: allocate pages of [`PAGE_BLOCKS`] blocks when they are needed, and copy nothing then. Otherwise there is one
            buffer, which is faster to read, and which is replaced by a larger one when it is full.
    """

    def __init__(self, states: torch.Tensor, block_size: int, device: torch.device, paged: bool):
        self.block_size = block_size
        self.page_slots = PAGE_BLOCKS * block_size if paged else None
        self._like = torch.empty_like(states[:, :, :0], device=device)
        self.pages: list[torch.Tensor] = [] if paged else [self._like]

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, head_dim = self._like.shape
        return torch.Size((batch, heads, sum(page.shape[2] for page in self.pages), head_dim))

    @property
    def nbytes(self) -> int:
        return sum(page.nbytes for page in self.pages)

    def reserve(self, slots: int) -> None:
        """Have at least this many slots; in a single buffer exactly so many."""
        if self.page_slots is None:
            self.pages[0] = grown(self.pages[0], slots)
            return
        batch, heads, _, head_dim = self._like.shape
        while len(self.pages) * self.page_slots < slots:
            self.pages.append(self._like.new_zeros(batch, heads, self.page_slots, head_dim))

    def write(self, row: torch.Tensor, slot: torch.Tensor, states: torch.Tensor) -> None:
        """Store the states `(tokens, kv_heads, head_dim)` of tokens at their rows and slots, each `(tokens,)`."""
        row, slot, states = row.to(self.device), slot.to(self.device), states.to(self.device)
        if len(self.pages) == 1:
            self.pages[0][row, :, slot] = states
            return
        page = slot // self.page_slots
        for number in page.unique().tolist():
            here = page == number
            self.pages[number][row[here], :, slot[here] % self.page_slots] = states[here]

    def read_tokens(self, row: torch.Tensor, head: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """States `(..., head_dim)`, where rows, heads and slots broadcast to `(...)`."""
        return self._read(row, head, slot, 1).squeeze(-2)

    def read_blocks(self, row: torch.Tensor, head: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """States `(..., block_size, head_dim)`, where rows, heads and slots of blocks broadcast to `(...)`."""
        return self._read(row, head, slot, self.block_size)

    def _read(self, row: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, unit: int) -> torch.Tensor:
        row, head, slot = (index.to(self.device) for index in (row, head, slot))
        if len(self.pages) == 1:
            return self.pages[0].unflatten(2, (-1, unit))[row, head, slot]
        row, head, slot = torch.broadcast_tensors(row, head, slot)
        units = self.page_slots // unit
        page = slot // units
        found = self._like.new_empty(*slot.shape, unit, self._like.shape[-1])
        for number in page.unique().tolist():
            here = page == number
            states = self.pages[number].unflatten(2, (-1, unit))
            found[here] = states[row[here], head[here], slot[here] % units]
        return found

    def first(self, slots: int) -> torch.Tensor:
        """The states of the first slots, `(batch, kv_heads, slots, head_dim)`."""
        if len(self.pages) == 1:
            return self.pages[0][:, :, :slots]
        return torch.cat([*self.pages, self._like], dim=2)[:, :, :slots]

    def apply(self, function) -> None:
        """Select rows, by a function of tensors whose dimension 0 are the rows."""
        self._like = function(self._like)
        self.pages = [function(page) for page in self.pages]
