"""A call of disentangled attention."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch

from ..call import AttentionCall


@dataclass(eq=False)
class DisentangledCall(AttentionCall):
    """A call with the positions of the pairs as rows of a table.

    The attention mask is boolean, `(batch, 1, 1 or q_len, kv_len)`.

    Attributes:
        position_key: `(heads, rows, head_dim)`, the positions as keys of the content; none leaves the term out.
        position_query: `(heads, rows, head_dim)`, the positions as queries of the content; none leaves the term out.
        rows: row of every distance from 1 - length to length - 1, ascending, `(2 * length - 1,)`; none if positions were
            given pair by pair or a graph is captured.
        index: without `rows`, makes the row of each pair, `(q_len, kv_len)` or `(batch, q_len, kv_len)`.
        buckets: `position_buckets`.
        max_distance: `max_relative_positions`.
        hf_compat: distances beyond the table as in transformers.
    """

    _: KW_ONLY
    position_key: torch.Tensor | None = None
    position_query: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    index: Callable[[], torch.Tensor] | None = None
    buckets: int = -1
    max_distance: int = 0
    hf_compat: bool = False

    @property
    def positions(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.position_key, self.position_query

    @property
    def has_positions(self) -> bool:
        return any(table is not None for table in self.positions)

    @property
    def needs_gradient(self) -> bool:
        tables = [table for table in self.positions if table is not None]
        return super().needs_gradient or (torch.is_grad_enabled() and any(table.requires_grad for table in tables))

    def row_of_pairs(self) -> torch.Tensor:
        """Row of each pair, `(q_len, kv_len)` or `(batch, q_len, kv_len)`."""
        if self.rows is None:
            return self.index()
        # Row i of the windows over ascending distances ends at key 0.
        return self.rows.unfold(0, self.key.shape[2], 1).flip(-1)
