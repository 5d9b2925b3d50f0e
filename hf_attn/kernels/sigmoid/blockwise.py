"""Sigmoid attention in blocks of weights, in plain PyTorch: memory linear in the sequence lengths.

    P_ij = sigmoid(scaling * q_i . k_j - slope * |i - j| + b) for allowed pairs, exactly 0 for masked ones;  O = P V

There are no row statistics, so a block of weights needs nothing from the others: it is computed, multiplied with its
values and forgotten. The backward pass computes it again and needs neither the output nor the weights (arXiv 2409.04431,
FlashSigmoid):

    dV = P^T dO;  dP = dO V^T;  dS = P (1 - P) dP;  dQ = scaling * dS K;  dK = scaling * dS^T Q

Logits and sigmoid are float32 for bfloat16 and float16 input. The products of bfloat16 input are bfloat16, as those of the
specification are, on devices that have instructions for them; elsewhere they are float32, which is faster there, except for
the few rows of a decoding step, where converting the keys would take longer than the product.
"""

from collections.abc import Iterator

import torch

from .. import bfloat16_cpu
from .call import BACKWARD_SCHEMA, FORWARD_SCHEMA, SigmoidCall, SigmoidOperands


# Found by measurement. A block of weights stays in the L2 cache of one core (1 MiB in float32) together with the keys and
# values it is computed from; where blocks are smaller, several heads share it.
BLOCK_ROWS = 256
BLOCK_COLUMNS = 512
WEIGHTS_IN_CACHE = 2**18
# Causal and windowed attention computes whole blocks along the edges of what is allowed. Lower blocks waste less there, which
# counts in short sequences, where edges are most of the work.
BLOCK_ROWS_AT_EDGES = 128
BLOCK_ROWS_AT_EDGES_IF_SHORT = 64
SHORT = 1024
# With no more rows than this, a pass over the weights costs less than preparing a copy of the keys.
# They are computed with all keys at once.
FEW_ROWS = 32


class _Blocks:
    """The weights of one call, block by block.

    Several (batch, key/value head) pairs are computed together, which is what [`pairs`] iterates over. All query
    heads of one key/value head share their products: the rows of a block are `(position, query head of the group)`.
    """

    def __init__(self, operands: SigmoidOperands):
        query, key, value, attention_mask, head_bias, alibi_slopes = operands[:6]
        self.query, self.key, self.value = query, key, value
        self.scaling, self.is_causal, self.sliding_window = (
            operands.scaling,
            operands.is_causal,
            operands.sliding_window,
        )
        self.offset, bias = operands.query_offset, operands.bias
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.batch, heads, self.q_len, self.head_dim = query.shape
        self.kv_heads, self.kv_len = key.shape[1], key.shape[2]
        self.groups = heads // self.kv_heads

        self.bias = bias if head_bias is None else head_bias.to(self.dtype).view(1, self.kv_heads, 1, self.groups, 1)
        self.slopes = None
        if alibi_slopes is not None:
            self.slopes = alibi_slopes.to(self.dtype).view(-1, self.kv_heads, 1, self.groups, 1)
        self.mask = None if attention_mask is None else self._mask_by_group(attention_mask)
        self.mask_blocks = {}
        self.position_masks = {}

        self.has_edges = operands.is_causal or operands.sliding_window is not None
        self.few_rows = few_rows = self.q_len * self.groups <= FEW_ROWS
        self.multiplies_in_bfloat16 = query.dtype == torch.bfloat16 and (
            few_rows or query.device.type != "cpu" or not bfloat16_cpu.PRODUCTS_ARE_SLOW
        )
        # Bias and key mask become additional columns of query and key, so that the product includes them.
        has_bias = head_bias is not None or bias != 0
        folds = not few_rows and not self.multiplies_in_bfloat16
        self.folds_bias = folds and has_bias
        self.folds_mask = folds and self.mask is not None and self.mask.shape[1:4] == (1, 1, 1)
        self.copies_keys = folds and (self.folds_bias or self.folds_mask or self.dtype != query.dtype)
        if self.multiplies_in_bfloat16 and head_bias is None:
            self.bias = query.new_full((), bias, dtype=self.dtype)

        self.adds_bias = has_bias and not self.folds_bias and not self.multiplies_in_bfloat16
        self.is_plain = not (
            self.adds_bias
            or self.slopes is not None
            or (self.mask is not None and not self.folds_mask)
            or self.has_edges
        )

        rows = BLOCK_ROWS
        if self.has_edges:
            rows = BLOCK_ROWS_AT_EDGES_IF_SHORT if self.kv_len <= SHORT else BLOCK_ROWS_AT_EDGES
        self.block_positions = max(1, min(rows // self.groups, self.q_len))
        self.block_columns = max(1, self.kv_len if few_rows else min(BLOCK_COLUMNS, self.kv_len))
        pairs = self.batch * self.kv_heads
        if query.device.type == "cpu":
            threads = torch.get_num_threads()
            in_cache = WEIGHTS_IN_CACHE // (self.block_positions * self.groups * self.block_columns)
            pairs = min(pairs, threads * max(1, in_cache))
        self.num_batches, self.num_heads = (
            (pairs // self.kv_heads, self.kv_heads) if pairs >= self.kv_heads else (1, pairs)
        )
        self.num_pairs = self.num_batches * self.num_heads

    def _mask_by_group(self, mask: torch.Tensor) -> torch.Tensor:
        """View of a broadcastable mask as `(batch, kv_heads, q_len, groups, kv_len)`, of size 1 wherever it repeats."""
        mask = mask[(None,) * (4 - mask.dim())]
        for dim in range(4):
            if mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
        groups = (self.kv_heads, self.groups) if mask.shape[1] > 1 else (1, 1)
        return mask.unflatten(1, groups).permute(0, 1, 3, 2, 4)

    def new_buffer(self) -> torch.Tensor:
        """Memory for one block of weights of as many pairs as are computed together."""
        rows = self.block_positions * self.groups
        return self.query.new_empty(self.num_pairs * rows * self.block_columns, dtype=self.dtype)

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Go through batches and key/value heads; [`weights`] then is about the slices yielded last."""
        for batch in range(0, self.batch, self.num_batches):
            for head in range(0, self.kv_heads, self.num_heads):
                self.batches = slice(batch, min(batch + self.num_batches, self.batch))
                self.heads = slice(head, min(head + self.num_heads, self.kv_heads))
                self._prepare()
                yield self.batches, self.heads

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of the current pairs of a `(batch, heads, q_len, dim)` tensor as `(batch, kv_heads, q_len, groups, dim)`."""
        return tensor[self.batches].unflatten(1, (self.kv_heads, self.groups))[:, self.heads].transpose(2, 3)

    def columns_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The current pairs of a `(batch, kv_heads, kv_len, dim)` tensor as `(pairs, kv_len, dim)`."""
        return tensor[self.batches, self.heads].flatten(0, 1)

    def _prepare(self):
        """Operands of the products for the current pairs; the scaling goes into the query."""
        rows = self.rows_of(self.query)
        self.operands = {}
        if self.multiplies_in_bfloat16:
            self.keys, self.values = self.columns_of(self.key), self.columns_of(self.value)
            # scaled afterwards, which saves a rounding
            self.scaled_query = rows.reshape(len(self.keys), -1, self.head_dim)
            return
        width = self.head_dim + self.folds_bias + self.folds_mask
        scaled = rows.new_empty(*rows.shape[:-1], width, dtype=self.dtype)
        torch.mul(rows.to(self.dtype), self.scaling, out=scaled[..., : self.head_dim])
        keys = self.columns_of(self.key)
        if self.copies_keys:
            source, keys = keys, keys.new_empty(*keys.shape[:-1], width, dtype=self.dtype)
            keys[..., : self.head_dim] = source
        if self.folds_bias:
            head_bias = self.bias[:, self.heads, ..., 0] if isinstance(self.bias, torch.Tensor) else self.bias
            scaled[..., self.head_dim] = head_bias
            keys[..., self.head_dim] = 1
        if self.folds_mask:
            scaled[..., -1] = 1
            mask = self._additive(self._mask_block(slice(0, self.q_len), slice(0, self.kv_len)))
            by_pair = keys.view(*rows.shape[:2], *keys.shape[1:])
            by_pair[..., -1] = mask.clamp_min_(torch.finfo(self.dtype).min)[:, :, 0, 0]
        self.scaled_query = scaled.view(keys.shape[0], -1, width)
        self.keys, self.values = keys, self.columns_of(self.value)
        if not self.few_rows:
            self.values = self.values.to(self.dtype)

    def _additive(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask as a new tensor that is added to logits, `-inf` where masked."""
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, float("-inf"))
        return mask.to(self.dtype).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))

    def _mask_block(self, positions: slice, columns: slice) -> torch.Tensor:
        index = (self.batches, self.heads, positions, slice(None), columns)
        return self.mask[tuple(i if size > 1 else slice(None) for i, size in zip(index, self.mask.shape, strict=True))]

    def _needed_mask(self, positions: slice, columns: slice) -> tuple[bool, torch.Tensor | None]:
        """Whether the mask allows any pair of a block, and the part of the mask to apply, if any."""
        if self.mask is None or self.folds_mask:
            return True, None
        mask = self._mask_block(positions, columns)
        if mask.device.type != "cpu":  # reading the mask would synchronise with the device
            return True, mask
        pairs = (
            part.start if size > 1 else 0
            for part, size in zip((self.batches, self.heads), self.mask.shape[:2], strict=True)
        )
        where = (*pairs, positions.start, columns.start)
        if where not in self.mask_blocks:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            changes_nothing = allowed.all() if mask.dtype == torch.bool else (mask == 0).all()
            self.mask_blocks[where] = bool(allowed.any()), not changes_nothing
        any_allowed, is_needed = self.mask_blocks[where]
        return any_allowed, mask if is_needed else None

    def position_blocks(self) -> Iterator[slice]:
        for start in range(0, self.q_len, self.block_positions):
            yield slice(start, min(start + self.block_positions, self.q_len))

    def column_blocks(self, positions: slice) -> Iterator[slice]:
        """The blocks of keys that causality and window allow for queries at `positions`."""
        first, last = positions.start + self.offset, positions.stop - 1 + self.offset
        start, stop = self._columns(first, last)
        for column in range(start, stop, self.block_columns):
            yield slice(column, min(column + self.block_columns, stop))

    def _columns(self, first: int, last: int) -> tuple[int, int]:
        """Range of keys with the ones seen from position `first` at its start, from position `last` at its end."""
        start, stop = 0, self.kv_len
        if self.is_causal:
            stop = min(stop, last + 1)
        if self.sliding_window is not None:
            start = max(start, first - self.sliding_window + 1)
            if not self.is_causal:
                stop = min(stop, last + self.sliding_window)
        return start, stop

    def _distances(self, positions: slice, columns: slice) -> torch.Tensor:
        query_positions = (
            torch.arange(positions.start, positions.stop, device=self.query.device)[:, None] + self.offset
        )
        return query_positions - torch.arange(columns.start, columns.stop, device=self.query.device)

    def _forbid_by_position(self, weights: torch.Tensor, positions: slice, columns: slice) -> None:
        # Allowed for every position of the block.
        start, stop = self._columns(positions.stop - 1 + self.offset, positions.start + self.offset)
        edges = []
        if columns.stop > stop:
            edges.append(slice(max(columns.start, stop), columns.stop))
        if columns.start < start:
            edges.append(slice(columns.start, min(columns.stop, start)))
        for edge in edges:
            shape = (positions.start - edge.start, positions.stop - positions.start, edge.stop - edge.start)
            if shape not in self.position_masks:
                distances = self._distances(positions, edge)
                forbidden = distances < 0 if self.is_causal else torch.zeros_like(distances, dtype=torch.bool)
                if self.sliding_window is not None:
                    forbidden |= distances.abs() >= self.sliding_window
                self.position_masks[shape] = forbidden[:, None]
            edge_of_weights = weights[..., edge.start - columns.start : edge.stop - columns.start]
            edge_of_weights.masked_fill_(self.position_masks[shape], 0)

    def queries_of(self, positions: slice) -> torch.Tensor:
        """The scaled queries of a block, `(pairs, rows, head_dim)`, further columns behind if anything is folded in."""
        return self.scaled_query[:, positions.start * self.groups : positions.stop * self.groups]

    def operands_of(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys of a block, `(pairs, columns, head_dim)` like the queries, and its values."""
        where = (columns.start, columns.stop)
        if where not in self.operands:
            dtype = self.keys.dtype if self.multiplies_in_bfloat16 else self.dtype
            self.operands[where] = self.keys[:, columns].to(dtype), self.values[:, columns].to(dtype)
        return self.operands[where]

    def weights(
        self, queries: torch.Tensor, keys: torch.Tensor, positions: slice, columns: slice, buffer: torch.Tensor
    ) -> torch.Tensor | None:
        """The weights of a block, `(pairs, rows, columns)` in `buffer`; `None` if the mask leaves none."""
        any_allowed, mask = self._needed_mask(positions, columns)
        if not any_allowed:
            return None
        pairs, rows, kv_len = queries.shape[0], queries.shape[1], keys.shape[1]
        weights = buffer[: pairs * rows * kv_len].view(pairs, rows, kv_len)
        by_group = weights.view(
            self.batches.stop - self.batches.start, -1, positions.stop - positions.start, self.groups, kv_len
        )
        if self.multiplies_in_bfloat16:
            weights.copy_(torch.bmm(queries, keys.transpose(1, 2)))
            bias = self.bias if self.bias.dim() == 0 else self.bias[:, self.heads]
            torch.add(bias, by_group, alpha=self.scaling, out=by_group)
        else:
            torch.bmm(queries, keys.transpose(1, 2), out=weights)
        if self.is_plain:
            return weights.sigmoid_()
        if self.adds_bias:
            by_group.add_(self.bias[:, self.heads] if isinstance(self.bias, torch.Tensor) else self.bias)
        if self.slopes is not None:
            slopes = self.slopes[self.batches if self.slopes.shape[0] > 1 else slice(None), self.heads]
            distances = self._distances(positions, columns).abs().to(self.dtype)
            by_group.addcmul_(slopes, distances[:, None], value=-1)
        if mask is not None and mask.dtype != torch.bool:
            by_group.add_(self._additive(mask))
        weights.sigmoid_()
        if mask is not None and mask.dtype == torch.bool:
            by_group.masked_fill_(~mask, 0)
        if self.has_edges:
            self._forbid_by_position(by_group, positions, columns)
        return weights


# The inner loops accumulate into small contiguous buffers: only these go through the batched product of the BLAS library.


@torch.library.custom_op("hf_attn::sigmoid_attention_blockwise", mutates_args=(), schema=FORWARD_SCHEMA)
def _blockwise(*operands) -> torch.Tensor:
    operands = SigmoidOperands(*operands)
    query, _, value = operands[:3]
    blocks = _Blocks(operands)
    output = _new_output(query, value)
    buffer = blocks.new_buffer()
    rows = blocks.block_positions * blocks.groups
    output_buffer = buffer.new_empty(blocks.num_pairs * rows * value.shape[-1])
    for _ in blocks.pairs():
        output_rows = blocks.rows_of(output)
        for positions in blocks.position_blocks():
            queries = blocks.queries_of(positions)
            block_output = output_buffer[: queries.shape[0] * queries.shape[1] * value.shape[-1]]
            block_output = block_output.view(*queries.shape[:2], value.shape[-1]).zero_()
            for columns in blocks.column_blocks(positions):
                keys, values = blocks.operands_of(columns)
                weights = blocks.weights(queries, keys, positions, columns, buffer)
                if weights is None:
                    continue
                if values.dtype == weights.dtype:
                    block_output.baddbmm_(weights, values)
                else:
                    block_output.add_(torch.bmm(weights.to(values.dtype), values))
            target = output_rows[:, :, positions]
            target.copy_(block_output.view(target.shape))
    return output


@_blockwise.register_fake
def _(query, key, value, *arguments):
    return _new_output(query, value)


def _new_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In memory `(batch, q_len, heads, value_dim)`, which is how models go on with it."""
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)


@torch.library.custom_op("hf_attn::sigmoid_attention_blockwise_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _blockwise_backward(grad_output: torch.Tensor, *operands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    operands = SigmoidOperands(*operands)
    query, key, value = operands[:3]
    blocks = _Blocks(operands)
    head_dim = query.shape[-1]
    grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    buffer = blocks.new_buffer()
    grad_buffer = torch.empty_like(buffer, dtype=torch.bfloat16 if blocks.multiplies_in_bfloat16 else None)
    for batches, heads in blocks.pairs():
        dtype = torch.bfloat16 if blocks.multiplies_in_bfloat16 else blocks.dtype
        grad_rows = blocks.rows_of(grad_output).to(dtype).flatten(2, 3).flatten(0, 1)
        grad_query_rows = blocks.rows_of(grad_query)
        grad_keys = torch.zeros_like(blocks.columns_of(key), dtype=blocks.dtype)
        grad_values = torch.zeros_like(blocks.columns_of(value), dtype=blocks.dtype)
        for positions in blocks.position_blocks():
            queries = blocks.queries_of(positions)
            grad_block = grad_rows[:, positions.start * blocks.groups : positions.stop * blocks.groups]
            grad_queries = grad_keys.new_zeros(*queries.shape[:2], head_dim)
            for columns in blocks.column_blocks(positions):
                keys, values = blocks.operands_of(columns)
                weights = blocks.weights(queries, keys, positions, columns, buffer)
                if weights is None:
                    continue
                grad_values[:, columns].add_(torch.bmm(weights.transpose(1, 2).to(dtype), grad_block))
                grad_weights = grad_buffer[: weights.numel()].view(weights.shape)
                torch.bmm(grad_block, values.transpose(1, 2), out=grad_weights)
                grad_logits = torch.ops.aten.sigmoid_backward.grad_input(
                    grad_weights, weights, grad_input=grad_weights
                )
                if dtype == blocks.dtype:
                    grad_queries.baddbmm_(grad_logits, keys[..., :head_dim])
                else:
                    grad_queries.add_(torch.bmm(grad_logits, keys))
                grad_keys[:, columns].add_(torch.bmm(grad_logits.transpose(1, 2), queries[..., :head_dim]))
            target = grad_query_rows[:, :, positions]
            target.copy_(grad_queries.mul_(operands.scaling).view(target.shape))
        if blocks.multiplies_in_bfloat16:  # else the queries were scaled
            grad_keys.mul_(operands.scaling)
        for gradient, accumulated in ((grad_key, grad_keys), (grad_value, grad_values)):
            target = gradient[batches, heads]
            target.copy_(accumulated.view(target.shape))
    return grad_query, grad_key, grad_value


@_blockwise_backward.register_fake
def _(grad_output, query, key, value, *arguments):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _backward(ctx, grad_output):
    gradients = _blockwise_backward(grad_output, *ctx.saved_tensors, *ctx.numbers)
    return *gradients, *(None,) * 8


_blockwise.register_autograd(_backward, setup_context=_setup_context)


def sigmoid_attention_blockwise(call: SigmoidCall) -> torch.Tensor:
    """Sigmoid attention with memory linear in the sequence lengths, forward and backward, on any device.

    Query, key and value get gradients. Blocks that causality, window or mask forbid altogether are not computed.

    Args:
        call: one that [`hf_attn.kernels.sigmoid.call.check_blockwise`] does not refuse.

    Returns:
        Output `(batch, heads, q_len, value_dim)` in the dtype of the query.
    """
    return _blockwise(*call.operands())
