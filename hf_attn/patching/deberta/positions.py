"""Which row of the table of relative positions a pair of tokens uses."""

from functools import lru_cache

import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position


def bucket_of_distance(distance: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """Bucket of a distance: exact up to the middle, then logarithmic, and the same for all beyond `max_distance - 1`.

    Args:
        distance: query position minus key position, any shape.
        buckets: number of buckets on each side, `position_buckets`.
        max_distance: `max_relative_positions`.

    Returns:
        Integers of the same shape within `1 - buckets` and `buckets - 1`; an odd function of the distance.
    """
    distance = distance.clamp(1 - max_distance, max_distance - 1)
    middle = buckets // 2
    size = distance.abs().clamp(min=middle).double()
    span = torch.tensor((max_distance - 1) / middle, dtype=torch.float64, device=distance.device).log()
    far = middle + torch.ceil((size / middle).log() / span * (middle - 1))
    return torch.where(distance.abs() <= middle, distance, distance.sign() * far.long())


@lru_cache(maxsize=32)
def rows_by_distance(span: int, buckets: int, max_distance: int, hf_compat: bool) -> torch.Tensor:
    """Row of the table for every distance until it changes no more, from the lowest (most negative) distance up.

    Args:
        span: half of the rows of the table.
        buckets: `position_buckets`; not positive for one row a distance.
        max_distance: `max_relative_positions`.
        hf_compat: as in transformers, which leaves out the official clamp: distances of `-max_distance` and below then
            use row 0, which training never touched.

    Returns:
        `(2 * limit + 1,)`, the row of distance `d` at `limit + d`; larger distances use the first or the last row.
    """
    # A tensor made in inference mode, or on the meta device while a model is built, would be of no use afterwards.
    with torch.inference_mode(False), torch.device("cpu"):
        limit = max(span, max_distance)
        while True:
            distances = torch.arange(-limit, limit + 1)
            if buckets > 0 and hf_compat:
                distances = make_log_bucket_position(distances, buckets, max_distance).long()
            elif buckets > 0:
                distances = bucket_of_distance(distances, buckets, max_distance)
            rows = (distances + span).clamp(0, 2 * span - 1)
            settled = not hf_compat or buckets <= 0 or (rows[0] == 0 and rows[-1] == 2 * span - 1)
            if settled:
                return rows
            limit *= 2


@lru_cache(maxsize=64)
def rows_of_length(
    length: int, span: int, buckets: int, max_distance: int, hf_compat: bool, device: torch.device
) -> tuple[int, int, torch.Tensor]:
    """The rows that occur in a sequence, for they are consecutive.

    Returns:
        First row, number of rows, and the row of each distance from `1 - length` to `length - 1` counted from the first,
        `(2 * length - 1,)`.
    """
    table = rows_by_distance(span, buckets, max_distance, hf_compat)
    limit = table.shape[0] // 2
    with torch.inference_mode(False):
        rows = table[torch.arange(1 - length, length, device="cpu").clamp(-limit, limit) + limit]
        first = int(rows[0])
        return first, int(rows[-1]) - first + 1, (rows - first).to(device)


def rows_of_pairs(distance: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Row of each distance, of any shape, looked up in the table of [`rows_by_distance`]."""
    limit = table.shape[0] // 2
    return table.to(distance.device)[distance.clamp(-limit, limit) + limit]
