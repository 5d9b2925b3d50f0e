"""Attention maps that do not depend on the input: queries and keys of a constant sequence, position by position."""

import torch
from torch import nn

from hf_attn.architectures.decoder import DecoderConfig, ValueLayer


class StaticInput(nn.Module):
    """The constant sequences of a model: random embeddings, token ids, or both. They are saved with it.

    Ids are drawn from the vocabulary when a model is made; the paper takes the beginning of its training text.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        kinds, length = config.static_kinds, config.static_length
        if "rnd_emb_qk" in kinds:
            self.embeds = nn.Buffer(torch.empty(length, config.hidden_size))
        if "fixed_seq_qk" in kinds:
            self.ids = nn.Buffer(torch.zeros(length, dtype=torch.long))

    def forward(self, kind: str, length: int) -> torch.Tensor:
        """The beginning of a kind's sequence: embeddings `(1, length, hidden_size)` or token ids `(1, length)`."""
        return (self.embeds if kind == "rnd_emb_qk" else self.ids)[None, :length]


class StaticMap:
    """Queries and keys of a constant sequence in one layer. Position `i` of any input attends as position `i` of it does.

    Args:
        queries: `(heads, length, head_dim)`.
        keys: `(kv_heads, length, head_dim)`.
        scaling: factor of the scores.
    """

    #: rows of the map that decoding computes at once
    BLOCK = 64

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor, scaling: float):
        self.queries, self.keys, self.scaling = queries, keys, scaling
        self._rows: tuple[int, torch.Tensor] | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        rows = 0 if self._rows is None else self._rows[1].nbytes
        return self.queries.nbytes + self.keys.nbytes + rows

    def to(self, device: torch.device) -> "StaticMap":
        if self.keys.device != device:
            self.queries, self.keys, self._rows = self.queries.to(device), self.keys.to(device), None
        return self

    def at(
        self, positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `(rows, heads, length, head_dim)` and keys `(rows, kv_heads, key_length, head_dim)`; one row serves a batch
        that has one.

        Args:
            positions: of the queries, `(rows, length)`.
            key_positions: of the keys, `(rows, up to key_length)`; 0, 1, 2... if not given. Slots beyond them hold nothing.
            key_length: number of keys.
        """
        if key_positions is None:
            keys = self.keys[None, :, :key_length]
        else:
            keys = self.keys[:, key_positions].transpose(0, 1)
        keys = nn.functional.pad(keys, (0, 0, 0, key_length - keys.shape[2]))
        return self.queries[:, positions].transpose(0, 1), keys

    def row(self, position: int) -> torch.Tensor:
        """Row `position` of the map, `(kv_heads, groups, position + 1)`, computed in blocks of rows."""
        start = position - position % self.BLOCK
        if self._rows is None or self._rows[0] != start:
            queries = self.queries[:, start : start + self.BLOCK]
            stop = start + queries.shape[1]
            queries = queries.unflatten(0, (self.keys.shape[0], -1)).flatten(1, 2)
            scores = (queries @ self.keys[:, :stop].transpose(-1, -2) * self.scaling).unflatten(1, (-1, stop - start))
            later = torch.ones(stop - start, stop, dtype=torch.bool, device=scores.device).triu(start + 1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32)
            self._rows = start, weights.to(queries.dtype)
        return self._rows[1][:, :, position - start, : position + 1]


class StaticMapLayer(ValueLayer):
    """A cache layer of values, which also stores the map of the constant sequence (`static_map`)."""

    @classmethod
    def in_place_of(cls, layer):
        """The layer for a mixer that found `layer` in the cache.

        Raises:
            ValueError: if the other layer holds tokens: their keys are not those of the constant sequence.
        """
        if int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"The cache contains keys and values of {int(layer.get_seq_length())} tokens in a layer whose "
                "attention map is that of a constant sequence. A cache that was filled by another model, or with a "
                "learned prefix (prefix tuning), cannot be used here."
            )
        layer = super().in_place_of(layer)
        # Positions are read off the mask of the caller, which `generate` turns into another for compiled caches.
        layer.is_compileable = False
        return layer
