"""CLEAR's image queries on the CPU, tile by tile, with memory linear in the number of image tokens.

A tile of 8 x 8 queries needs the keys of its own rectangle grown by the reach of the disc and clipped at the border of
the image. Tiles of equal shape are computed together. With the keys of a row of tiles in memory column by column, those of
a tile are one piece of it, and nothing has to be copied for each tile. Keys that all image queries see, text and pooled ones, are a
second attention of their own; the two are merged by their log-sum-exps:

    O = sum_p exp(L_p - L) O_p,    L = log sum_p exp(L_p)

The backward pass of attention is given O and L of the merged result (arXiv 2307.08691, section 3.1): its gradients of a
part of the keys are then those of the whole.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from ..call import Refusal
from .call import ClearCall


TILE = 8
# Elements of the keys of the tiles computed together: 8 MiB in float32. Found by measurement.
GATHERED_KEYS = 2**21

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Side(NamedTuple):
    """Neighbouring tiles of equal shape along one side of the image.

    Attributes:
        start: first position of the first tile.
        count: number of tiles, `TILE` apart.
        size: positions of a tile.
        before: positions of its keys before its own first one.
        keys: positions of its keys.
    """

    start: int
    count: int
    size: int
    before: int
    keys: int

    def part(self, first: int, count: int) -> "_Side":
        return self._replace(start=self.start + first * TILE, count=min(count, self.count - first))

    @property
    def queries_slice(self) -> slice:
        return slice(self.start, self.start + (self.count - 1) * TILE + self.size)

    @property
    def keys_slice(self) -> slice:
        return slice(self.start - self.before, self.start - self.before + (self.count - 1) * TILE + self.keys)


def _sides(length: int, reach: int) -> list[_Side]:
    tiles = []
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        first, last = max(0, start - reach), min(length, stop + reach)
        tiles.append(_Side(start, 1, stop - start, start - first, last - first))
    sides = []
    for _, equal in groupby(tiles, key=lambda tile: tile[2:]):
        first, *others = equal
        sides.append(first._replace(count=1 + len(others)))
    return sides


@lru_cache(maxsize=128)
def _disc_mask(rows: _Side, columns: _Side, radius: int, dtype: torch.dtype) -> torch.Tensor:
    """Bias of the logits of a tile, `(1, 1, queries, keys)`, queries row by row and keys column by column.

    The sides' start and count do not matter.
    """
    # A tensor made in inference mode could not be used outside.
    with torch.inference_mode(False):
        vertical, horizontal = (
            (torch.arange(side.size)[:, None] + side.before - torch.arange(side.keys)) ** 2 for side in (rows, columns)
        )
        inside = vertical[:, None, None, :] + horizontal[None, :, :, None] < radius**2
        mask = torch.zeros(inside.shape, dtype=dtype).masked_fill_(~inside, -torch.inf)
        return mask.flatten(0, 1).flatten(1).unsqueeze(0).unsqueeze(0)


class _Tiles(NamedTuple):
    """Tiles that are computed together: some pairs of batch and head, and tiles of equal shape in rows and columns."""

    pairs: slice
    rows: _Side
    columns: _Side

    def mask(self, radius: int, dtype: torch.dtype) -> torch.Tensor:
        shapes = (side._replace(start=0, count=1) for side in (self.rows, self.columns))
        return _disc_mask(*shapes, radius, dtype)

    def queries_of(self, states: torch.Tensor) -> torch.Tensor:
        """View of `(pairs, height, width, ...)` as `(pairs, rows of tiles, columns of tiles, rows, columns, ...)`."""
        states = states[self.pairs, self.rows.queries_slice, self.columns.queries_slice]
        states = states.unfold(1, self.rows.size, TILE).unfold(2, self.columns.size, TILE)
        return states if states.dim() == 5 else states.movedim(3, -1)

    def keys_of(self, states: torch.Tensor) -> torch.Tensor:
        """The keys of each tile, column by column: `(pairs * rows of tiles, columns of tiles, keys of a tile, head_dim)`.

        Those of a row of tiles are gathered once, and the tiles are overlapping views of them.
        """
        states = states[self.pairs, self.rows.keys_slice, self.columns.keys_slice]
        bands = states.unfold(1, self.rows.keys, TILE).permute(0, 1, 2, 4, 3).flatten(0, 1).contiguous()
        return bands.unfold(1, self.columns.keys, TILE).permute(0, 1, 4, 2, 3).flatten(2, 3)

    def add_to_keys(self, target: torch.Tensor, gathered: torch.Tensor) -> None:
        """The transpose of [`keys_of`]: add the values for the keys of each tile to `(pairs, height, width, head_dim)`."""
        target = target[self.pairs]
        gathered = gathered.unflatten(0, (target.shape[0], self.rows.count))
        gathered = gathered.unflatten(3, (self.columns.keys, self.rows.keys)).transpose(3, 4)
        for row in range(self.rows.count):
            for column in range(self.columns.count):
                where = self.rows.part(row, 1).keys_slice, self.columns.part(column, 1).keys_slice
                target[:, *where].add_(gathered[:, row, column])


def _flat(tiles: torch.Tensor) -> torch.Tensor:
    """`(pairs, rows of tiles, columns of tiles, rows, columns, ...)` as `(pairs * rows of tiles, columns of tiles, positions, ...)`."""
    return tiles.flatten(0, 1).flatten(2, 3)


def _tiles(pairs: int, height: int, width: int, head_dim: int, radius: int) -> Iterator[_Tiles]:
    for rows in _sides(height, radius - 1):
        for columns in _sides(width, radius - 1):
            together = max(1, GATHERED_KEYS // (rows.keys * columns.keys * head_dim))
            num_columns = min(columns.count, together)
            num_rows = min(rows.count, together // num_columns)
            num_pairs = min(pairs, together // (num_columns * num_rows))
            for pair in range(0, pairs, num_pairs):
                for row in range(0, rows.count, num_rows):
                    for column in range(0, columns.count, num_columns):
                        yield _Tiles(
                            slice(pair, pair + num_pairs), rows.part(row, num_rows), columns.part(column, num_columns)
                        )


def _images(states: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(batch, heads, height * width, ...)` as `(pairs, height, width, ...)`."""
    return states.flatten(0, 1).unflatten(1, (height, width))


@torch.library.custom_op("hf_attn::clear_attention_tiles", mutates_args=())
def _tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
    shared_bias: torch.Tensor | None,
    height: int,
    width: int,
    radius: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty(query.shape, dtype=query.dtype)
    logsumexp = torch.empty(query.shape[:3], dtype=wide)
    queries, keys, values, outputs, logsumexps = (
        _images(states, height, width) for states in (query, key, value, output, logsumexp)
    )
    for tiles in _tiles(*queries.shape, radius):
        tile_output, tile_logsumexp = _attention(
            _flat(tiles.queries_of(queries)),
            tiles.keys_of(keys),
            tiles.keys_of(values),
            attn_mask=tiles.mask(radius, query.dtype),
            scale=scaling,
        )
        for target, computed in ((outputs, tile_output), (logsumexps, tile_logsumexp)):
            target = tiles.queries_of(target)
            target.copy_(computed.reshape(target.shape))
    if shared_key.shape[2]:
        shared_output, shared_logsumexp = _attention(
            query, shared_key, shared_value, attn_mask=shared_bias, scale=scaling
        )
        share = torch.sigmoid(shared_logsumexp - logsumexp)
        output = output.to(wide).lerp_(shared_output.to(wide), share[..., None]).to(query.dtype)
        logsumexp = torch.logaddexp(logsumexp, shared_logsumexp)
    return output, logsumexp


@_tiled.register_fake
def _(query, key, value, shared_key, shared_value, shared_bias, height, width, radius, scaling):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("hf_attn::clear_attention_tiles_backward", mutates_args=())
def _tiled_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
    shared_bias: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    height: int,
    width: int,
    radius: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query, grad_key, grad_value = (torch.zeros(states.shape, dtype=wide) for states in (query, key, value))
    tensors = (grad_output, query, key, value, output, logsumexp, grad_query, grad_key, grad_value)
    grads, queries, keys, values, outputs, logsumexps, grad_queries, grad_keys, grad_values = (
        _images(states, height, width) for states in tensors
    )
    for tiles in _tiles(*queries.shape, radius):
        tile_grads = _attention_backward(
            _flat(tiles.queries_of(grads)),
            _flat(tiles.queries_of(queries)),
            tiles.keys_of(keys),
            tiles.keys_of(values),
            _flat(tiles.queries_of(outputs)),
            _flat(tiles.queries_of(logsumexps)),
            0.0,
            False,
            attn_mask=tiles.mask(radius, query.dtype),
            scale=scaling,
        )
        target = tiles.queries_of(grad_queries)
        target.copy_(tile_grads[0].reshape(target.shape))
        tiles.add_to_keys(grad_keys, tile_grads[1])
        tiles.add_to_keys(grad_values, tile_grads[2])
    grad_shared_key, grad_shared_value = torch.zeros_like(shared_key), torch.zeros_like(shared_value)
    if shared_key.shape[2]:
        shared_grads = _attention_backward(
            grad_output,
            query,
            shared_key,
            shared_value,
            output,
            logsumexp,
            0.0,
            False,
            attn_mask=shared_bias,
            scale=scaling,
        )
        grad_query += shared_grads[0]
        grad_shared_key, grad_shared_value = shared_grads[1:]
    return (
        *(grad.to(query.dtype) for grad in (grad_query, grad_key, grad_value)),
        grad_shared_key,
        grad_shared_value,
    )


@_tiled_backward.register_fake
def _(grad_output, query, key, value, shared_key, shared_value, *arguments):
    return tuple(states.new_empty(states.shape) for states in (query, key, value, shared_key, shared_value))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.height, ctx.width, ctx.radius, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_output, _):
    gradients = _tiled_backward(
        grad_output.contiguous(), *ctx.saved_tensors, ctx.height, ctx.width, ctx.radius, ctx.scaling
    )
    return *gradients, *(None,) * 5


_tiled.register_autograd(_backward, setup_context=_setup_context)


def clear_attention_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
    *,
    grid: tuple[int, int],
    radius: int,
    shared_mask: torch.Tensor | None = None,
    scaling: float,
) -> torch.Tensor:
    """CLEAR attention of image queries, to the disc around them and to the keys that they share.

    Args:
        query: of image tokens, row by row, `(batch, heads, height * width, head_dim)`, on the CPU.
        key: of the same shape.
        value: of the same shape.
        shared_key: keys for every query, `(batch, heads, shared, head_dim)`, possibly none.
        shared_value: their values.
        grid: `(height, width)`.
        radius: of the disc, in tokens; the cells at exactly this distance are outside.
        shared_mask: boolean `(batch, shared)`, False for masked shared keys.
        scaling: of the logits.

    Returns:
        Output `(batch, heads, height * width, head_dim)`.
    """
    bias = None
    if shared_mask is not None:
        # Not minus infinity, because a row with only masked keys would have no finite log-sum-exp.
        bias = torch.zeros(shared_mask.shape, dtype=query.dtype)
        bias = bias.masked_fill(~shared_mask, torch.finfo(query.dtype).min)[:, None, None, :]
        bias = bias.expand(-1, 1, query.shape[2], -1)
    return _tiled(query, key, value, shared_key, shared_value, bias, *grid, radius, scaling)[0]


def attention_with_logsumexp(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and the log-sum-exp of its logits.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`.
        value: of the shape of the keys.
        mask: boolean, broadcast to `(batch, heads, queries, keys)`; None for no mask.
        scaling: of the logits.

    Returns:
        Output of the shape of the query, and `(batch, heads, queries)` in float32 or wider.
    """
    if query.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
            bias = bias.expand(-1, -1, query.shape[2], -1)
        return _attention(query, key, value, attn_mask=bias, scale=scaling)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (scaling * query @ key.transpose(2, 3)).to(wide)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    logsumexp = logits.logsumexp(dim=-1)
    return torch.exp(logits - logsumexp[..., None]).to(query.dtype) @ value, logsumexp


def check_tiles(call: ClearCall) -> Refusal | None:
    """Whether the tiles support a call."""
    if call.query.device.type != "cpu":
        return Refusal(f"'tiles' runs on the CPU, but the query is on {call.query.device}")
    return None
