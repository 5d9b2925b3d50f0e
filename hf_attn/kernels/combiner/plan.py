"""Plans of Combiner attention: which tokens attend directly, and which through the summary of a span.

Position `i` is in row `i // s` and column `i % s` of a grid whose rows are the segments of length `s`.
"""

from dataclasses import dataclass

import torch


#: plans that are functions of query, key and value
KINDS = ("fixed", "logsparse", "vertical", "horizontal", "mixture")
#: the plan whose summaries have weights of their own
ROWMAJOR = "rowmajor"
#: plans that the paper also defines for bidirectional attention
BIDIRECTIONAL_KINDS = ("fixed", "vertical", "horizontal", ROWMAJOR)
#: plans in which a token may also attend to the summary of its own segment
OWN_SUMMARY_KINDS = ("fixed", "horizontal", ROWMAJOR)


@dataclass(frozen=True)
class Plan:
    """A plan as masks.

    Attributes:
        direct: boolean `(length, length)`, the positions that a query attends to directly.
        members: boolean `(spans, length)`, the positions of each span.
        uses: boolean `(length, spans)`, the spans that a query attends to.
        asking: position `(spans,)` whose query reads the span, for spans that have one; otherwise the query of a span is
            pooled.
    """

    direct: torch.Tensor
    members: torch.Tensor
    uses: torch.Tensor
    asking: torch.Tensor | None = None


def make_plan(
    kind: str,
    length: int,
    segment_length: int,
    is_causal: bool,
    own_segment_summary: bool = False,
    device: torch.device | None = None,
) -> Plan:
    """The plan of a kind for a length.

    Args:
        kind: one of [`KINDS`], or [`ROWMAJOR`].
        length: number of tokens.
        segment_length: tokens of a segment; `logsparse` has none.
        is_causal: whether a token attends only to itself and earlier tokens.
        own_segment_summary: whether, without causality, a token also attends to the summary of its own segment.
        device: of the masks.
    """
    position = torch.arange(length, device=device)
    if kind == "logsparse":
        return _logsparse(position)
    row, column = position // segment_length, position % segment_length
    rows = torch.arange(-(-length // segment_length), device=device)
    columns = torch.arange(min(segment_length, length), device=device)
    # The spans of a grid cell: one for each row and column, in this order.
    cell_row, cell_column = rows.repeat_interleave(len(columns)), columns.repeat(len(rows))

    def seen(row_of_span: torch.Tensor) -> torch.Tensor:
        """Whether a query may attend to the span of a row, by the rows of both."""
        if is_causal:
            return row_of_span < row[:, None]
        return torch.ones_like(row[:, None] == row_of_span) if own_segment_summary else row_of_span != row[:, None]

    same_row, same_column = row[:, None] == row, column[:, None] == column
    earlier = position <= position[:, None] if is_causal else torch.ones_like(same_row)
    if kind == "fixed":
        return Plan(same_row & earlier, rows[:, None] == row, seen(rows))
    in_row, in_column = cell_row[:, None] == row, cell_column[:, None] == column
    own_column = column[:, None] == cell_column
    if kind == ROWMAJOR:
        # Its last token is the query for the columns that a row lacks.
        asking = (cell_row * segment_length + cell_column).clamp(max=length - 1)
        return Plan(same_row & earlier, in_row, seen(cell_row) & own_column, asking)
    other_rows = row < cell_row[:, None] if is_causal else row != cell_row[:, None]
    vertical = (in_column & other_rows, (row[:, None] == cell_row) & ~own_column)
    if kind == "vertical":
        spans = [vertical]
    elif kind == "horizontal":
        spans = [(in_row & ~in_column, seen(cell_row) & own_column)]
    elif kind == "mixture":
        sides = (in_row & (column < cell_column[:, None]), in_row & (column > cell_column[:, None]))
        spans = [vertical, *((side, seen(cell_row) & own_column) for side in sides)]
    else:
        raise ValueError(f"kind must be one of {', '.join((*KINDS, ROWMAJOR))}.")
    members, uses = (torch.cat(masks, dim=dim) for masks, dim in zip(zip(*spans, strict=True), (0, 1), strict=True))
    return Plan((same_row | same_column) & earlier, members, uses)


def levels(length: int) -> int:
    """Number of span lengths 1, 2, 4, ... that positions below `length` need."""
    return (length - 1).bit_length()


def _logsparse(position: torch.Tensor) -> Plan:
    """Each set bit `t` of a position stands for a span of `2 ** t` tokens; from the highest bit down they tile what is
    before it."""
    length = len(position)
    members, uses = [torch.zeros(0, length, dtype=torch.bool, device=position.device)], []
    for level in range(levels(length)):
        pair = torch.arange(((length - 1) >> (level + 1)) + 1, device=position.device)
        members.append((position >> level) == 2 * pair[:, None])
        uses.append((((position >> level) & 1) == 1)[:, None] & ((position >> (level + 1))[:, None] == pair))
    direct = position[:, None] == position
    uses = torch.cat(uses, dim=1) if uses else torch.zeros(length, 0, dtype=torch.bool, device=position.device)
    return Plan(direct, torch.cat(members), uses)
