"""Sigmoid attention in Triton, forward and backward.

    P_ij = sigmoid(scaling * q_i . k_j - slope * |i - j| + b) for allowed pairs, exactly 0 for masked ones;  O = P V

As in FlashSigmoid (arXiv 2409.04431) there are no row statistics: the forward pass saves nothing, the backward pass
computes the weights again and needs no output.

    dV = P^T dO;  dP = dO V^T;  dS = P (1 - P) dP;  dQ = scaling * dS K;  dK = scaling * dS^T Q

Causality and sliding windows are one thing here: query `i` and key `j` may meet if `min_distance <= i + query_offset
- j <= max_distance`. Blocks that lie inside of these bounds are computed without looking at positions, blocks outside
are skipped.
"""

import torch
import triton
import triton.language as tl

from ..triton_tiles import (
    dimension_constants,
    load_rows,
    new_gradients,
    new_output,
    on_device,
    strides,
    with_contiguous_rows,
)
from .call import BACKWARD_SCHEMA, FORWARD_SCHEMA, SigmoidCall, SigmoidOperands


# Beyond any distance, and far enough from the limits of int32 to add a position to it.
UNBOUNDED = 2**30


@triton.jit
def _meeting_range(
    first_start, last_start, first_stop, last_stop, length, BLOCK: tl.constexpr
):  # fmt: skip
    """Blocks that a tile meets: [start, inner_start) and [inner_stop, stop) in part, [inner_start, inner_stop) wholly.

    `first_start` and `first_stop` bound (inclusively) what the first row of the tile meets, `last_*` the last row.
    """
    start = tl.maximum(first_start, 0) // BLOCK * BLOCK
    stop = tl.maximum(tl.minimum(last_stop + 1, length), start)
    inner_start = tl.minimum((tl.maximum(last_start, 0) + BLOCK - 1) // BLOCK * BLOCK, stop)
    inner_stop = tl.maximum(tl.minimum(first_stop + 1, length) // BLOCK * BLOCK, inner_start)
    return start, inner_start, inner_stop, stop


@triton.jit
def _weights(
    logits,
    rows,
    columns,
    mask,
    stride_mask_row,
    stride_mask_column,
    masked_at,
    bias,
    slope,
    q_len,
    kv_len,
    query_offset,
    min_distance,
    max_distance,
    MASK: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    EDGE: tl.constexpr,
):
    """P from scaled products; `rows` and `columns` broadcast against each other in either orientation.

    Rows and columns beyond the bounds need no masking, because they are multiplied by zeros.
    """
    distance = rows + query_offset - columns
    logits += bias
    if HAS_ALIBI:
        logits -= slope * tl.abs(distance).to(tl.float32)
    if MASK != "none":
        pointer = mask + rows.to(tl.int64) * stride_mask_row + columns * stride_mask_column
        if EDGE:
            entries = tl.load(pointer, mask=(rows < q_len) & (columns < kv_len), other=0)
        else:
            entries = tl.load(pointer)
    if MASK == "additive":
        entries = entries.to(tl.float32)
        logits += entries
    weights = tl.sigmoid(logits)
    if MASK == "additive":
        weights = tl.where(entries > masked_at, weights, 0.0)
    if MASK == "boolean":
        weights = tl.where(entries != 0, weights, 0.0)
    if EDGE:
        weights = tl.where((distance >= min_distance) & (distance <= max_distance), weights, 0.0)
    return weights


@triton.jit
def _forward_blocks(
    output, queries, key, value, rows, start, stop,
    stride_key, stride_value, mask, stride_mask_row, stride_mask_column, masked_at, scaling, bias, slope,
    q_len, kv_len, query_offset, min_distance, max_distance,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    for column in range(start, stop, BLOCK_COLUMNS):
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, EDGE)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
        weights = _weights(
            logits, rows[:, None], columns[None, :], mask, stride_mask_row, stride_mask_column, masked_at, bias, slope,
            q_len, kv_len, query_offset, min_distance, max_distance, MASK, HAS_ALIBI, EDGE,
        )  # fmt: skip
        values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, EDGE)
        output = tl.dot(weights.to(values.dtype), values, output, input_precision="ieee")
    return output


@triton.jit
def _forward_kernel(
    query, key, value, output, mask, head_bias, slopes,
    stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head, stride_key,
    stride_value_batch, stride_value_head, stride_value, stride_output_batch, stride_output_head, stride_output,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_column, stride_slopes_batch,
    scaling, bias, masked_at, heads, groups, q_len, kv_len, query_offset, min_distance, max_distance,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr, HAS_HEAD_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head // groups * stride_key_head
    value += batch * stride_value_batch + head // groups * stride_value_head
    output += batch * stride_output_batch + head * stride_output_head
    mask += batch * stride_mask_batch + head * stride_mask_head
    if HAS_HEAD_BIAS:
        bias = tl.load(head_bias + head)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + batch * stride_slopes_batch + head)

    rows = row + tl.arange(0, BLOCK_ROWS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    queries = load_rows(query, rows, stride_query, q_len, dims, HEAD_DIM, True)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], dtype=tl.float32)

    first = row + query_offset
    last = tl.minimum(row + BLOCK_ROWS, q_len) - 1 + query_offset
    start, inner_start, inner_stop, stop = _meeting_range(
        first - max_distance, last - max_distance, first - min_distance, last - min_distance, kv_len, BLOCK_COLUMNS
    )
    for part in tl.static_range(3):
        part_start = start if part == 0 else (inner_start if part == 1 else inner_stop)
        part_stop = inner_start if part == 0 else (inner_stop if part == 1 else stop)
        accumulator = _forward_blocks(
            accumulator, queries, key, value, rows, part_start, part_stop,
            stride_key, stride_value, mask, stride_mask_row, stride_mask_column, masked_at, scaling, bias, slope,
            q_len, kv_len, query_offset, min_distance, max_distance,
            HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_COLUMNS, MASK, HAS_ALIBI, part != 1,
        )  # fmt: skip

    tl.store(
        output + rows[:, None] * stride_output + value_dims[None, :],
        accumulator.to(output.dtype.element_ty),
        mask=(rows[:, None] < q_len) & (value_dims[None, :] < VALUE_DIM),
    )


@triton.jit
def _grad_query_blocks(
    grad_queries, queries, grad_outputs, key, value, rows, start, stop,
    stride_key, stride_value, mask, stride_mask_row, stride_mask_column, masked_at, scaling, bias, slope,
    q_len, kv_len, query_offset, min_distance, max_distance,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    for column in range(start, stop, BLOCK_COLUMNS):
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, EDGE)
        values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, EDGE)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
        weights = _weights(
            logits, rows[:, None], columns[None, :], mask, stride_mask_row, stride_mask_column, masked_at, bias, slope,
            q_len, kv_len, query_offset, min_distance, max_distance, MASK, HAS_ALIBI, EDGE,
        )  # fmt: skip
        grad_weights = tl.dot(grad_outputs, tl.trans(values), input_precision="ieee")
        grad_logits = weights * (1.0 - weights) * grad_weights
        grad_queries = tl.dot(grad_logits.to(keys.dtype), keys, grad_queries, input_precision="ieee")
    return grad_queries


@triton.jit
def _grad_query_kernel(
    query, key, value, grad_output, grad_query, mask, head_bias, slopes,
    stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head, stride_key,
    stride_value_batch, stride_value_head, stride_value, stride_output_batch, stride_output_head, stride_output,
    stride_grad_batch, stride_grad_head, stride_grad,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_column, stride_slopes_batch,
    scaling, bias, masked_at, heads, groups, q_len, kv_len, query_offset, min_distance, max_distance,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr, HAS_HEAD_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head // groups * stride_key_head
    value += batch * stride_value_batch + head // groups * stride_value_head
    grad_output += batch * stride_output_batch + head * stride_output_head
    grad_query += batch * stride_grad_batch + head * stride_grad_head
    mask += batch * stride_mask_batch + head * stride_mask_head
    if HAS_HEAD_BIAS:
        bias = tl.load(head_bias + head)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + batch * stride_slopes_batch + head)

    rows = row + tl.arange(0, BLOCK_ROWS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    queries = load_rows(query, rows, stride_query, q_len, dims, HEAD_DIM, True)
    grad_outputs = load_rows(grad_output, rows, stride_output, q_len, value_dims, VALUE_DIM, True)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)

    first = row + query_offset
    last = tl.minimum(row + BLOCK_ROWS, q_len) - 1 + query_offset
    start, inner_start, inner_stop, stop = _meeting_range(
        first - max_distance, last - max_distance, first - min_distance, last - min_distance, kv_len, BLOCK_COLUMNS
    )
    for part in tl.static_range(3):
        part_start = start if part == 0 else (inner_start if part == 1 else inner_stop)
        part_stop = inner_start if part == 0 else (inner_stop if part == 1 else stop)
        accumulator = _grad_query_blocks(
            accumulator, queries, grad_outputs, key, value, rows, part_start, part_stop,
            stride_key, stride_value, mask, stride_mask_row, stride_mask_column, masked_at, scaling, bias, slope,
            q_len, kv_len, query_offset, min_distance, max_distance,
            HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_COLUMNS, MASK, HAS_ALIBI, part != 1,
        )  # fmt: skip

    tl.store(
        grad_query + rows[:, None] * stride_grad + dims[None, :],
        (accumulator * scaling).to(grad_query.dtype.element_ty),
        mask=(rows[:, None] < q_len) & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def _grad_key_value_blocks(
    grad_keys, grad_values, keys, values, query, grad_output, columns, start, stop,
    stride_query, stride_output, mask, stride_mask_row, stride_mask_column, masked_at, scaling, bias, slope,
    q_len, kv_len, query_offset, min_distance, max_distance,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    for row in range(start, stop, BLOCK_ROWS):
        rows = row + tl.arange(0, BLOCK_ROWS)
        queries = load_rows(query, rows, stride_query, q_len, dims, HEAD_DIM, EDGE)
        grad_outputs = load_rows(grad_output, rows, stride_output, q_len, value_dims, VALUE_DIM, EDGE)
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scaling
        weights = _weights(
            logits, rows[None, :], columns[:, None], mask, stride_mask_row, stride_mask_column, masked_at, bias, slope,
            q_len, kv_len, query_offset, min_distance, max_distance, MASK, HAS_ALIBI, EDGE,
        )  # fmt: skip
        grad_values = tl.dot(weights.to(grad_outputs.dtype), grad_outputs, grad_values, input_precision="ieee")
        grad_weights = tl.dot(values, tl.trans(grad_outputs), input_precision="ieee")
        grad_logits = weights * (1.0 - weights) * grad_weights
        grad_keys = tl.dot(grad_logits.to(queries.dtype), queries, grad_keys, input_precision="ieee")
    return grad_keys, grad_values


@triton.jit
def _grad_key_value_kernel(
    query, key, value, grad_output, grad_key, grad_value, mask, head_bias, slopes,
    stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head, stride_key,
    stride_value_batch, stride_value_head, stride_value, stride_output_batch, stride_output_head, stride_output,
    stride_grad_key_batch, stride_grad_key_head, stride_grad_key,
    stride_grad_value_batch, stride_grad_value_head, stride_grad_value,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_column, stride_slopes_batch,
    scaling, bias, masked_at, heads, groups, q_len, kv_len, query_offset, min_distance, max_distance,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr, HAS_HEAD_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // groups
    column = tl.program_id(0) * BLOCK_COLUMNS
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    key += batch * stride_key_batch + kv_head * stride_key_head
    value += batch * stride_value_batch + kv_head * stride_value_head
    grad_key += batch * stride_grad_key_batch + kv_head * stride_grad_key_head
    grad_value += batch * stride_grad_value_batch + kv_head * stride_grad_value_head

    columns = column + tl.arange(0, BLOCK_COLUMNS)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, True)
    values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, True)
    grad_keys = tl.zeros([BLOCK_COLUMNS, BLOCK_DIM], dtype=tl.float32)
    grad_values = tl.zeros([BLOCK_COLUMNS, BLOCK_VALUE_DIM], dtype=tl.float32)

    first = column - query_offset
    last = tl.minimum(column + BLOCK_COLUMNS, kv_len) - 1 - query_offset
    start, inner_start, inner_stop, stop = _meeting_range(
        first + min_distance, last + min_distance, first + max_distance, last + max_distance, q_len, BLOCK_ROWS
    )
    # A partial tile of keys needs bounds in the mask, which only edges check.
    if column + BLOCK_COLUMNS > kv_len:
        inner_stop = inner_start
    for group in range(groups):
        head = kv_head * groups + group
        if HAS_HEAD_BIAS:
            bias = tl.load(head_bias + head)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes + batch * stride_slopes_batch + head)
        for part in tl.static_range(3):
            part_start = start if part == 0 else (inner_start if part == 1 else inner_stop)
            part_stop = inner_start if part == 0 else (inner_stop if part == 1 else stop)
            grad_keys, grad_values = _grad_key_value_blocks(
                grad_keys, grad_values, keys, values,
                query + batch * stride_query_batch + head * stride_query_head,
                grad_output + batch * stride_output_batch + head * stride_output_head,
                columns, part_start, part_stop, stride_query, stride_output,
                mask + batch * stride_mask_batch + head * stride_mask_head,
                stride_mask_row, stride_mask_column, masked_at, scaling, bias, slope,
                q_len, kv_len, query_offset, min_distance, max_distance,
                HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_ROWS, MASK, HAS_ALIBI, part != 1,
            )  # fmt: skip

    tl.store(
        grad_key + columns[:, None] * stride_grad_key + dims[None, :],
        (grad_keys * scaling).to(grad_key.dtype.element_ty),
        mask=(columns[:, None] < kv_len) & (dims[None, :] < HEAD_DIM),
    )
    tl.store(
        grad_value + columns[:, None] * stride_grad_value + value_dims[None, :],
        grad_values.to(grad_value.dtype.element_ty),
        mask=(columns[:, None] < kv_len) & (value_dims[None, :] < VALUE_DIM),
    )


KERNELS = {"forward": _forward_kernel, "grad_query": _grad_query_kernel, "grad_key_value": _grad_key_value_kernel}

# (rows, columns, warps) of the tiles by the bytes of a row of query, key or value: without spilled registers on sm_80 and
# sm_90 for 16-bit types up to head dimension 128, and within the shared memory of sm_80, sm_86, sm_90 and gfx942 for all.
TILES = {
    "forward": {128: (128, 64, 8), 256: (128, 64, 8), 512: (64, 32, 4), 1024: (32, 16, 4)},
    "grad_query": {128: (64, 64, 4), 256: (64, 64, 8), 512: (32, 32, 4), 1024: (16, 16, 4)},
    "grad_key_value": {128: (32, 64, 4), 256: (32, 64, 8), 512: (32, 32, 4), 1024: (16, 16, 4)},
}


def launch_options(kernel: str, head_dim: int, dtype: torch.dtype, *, is_hip: bool) -> dict[str, int]:
    """Tiles and launch parameters of a kernel.

    Args:
        kernel: `"forward"`, `"grad_query"` or `"grad_key_value"`.
        head_dim: the larger one of head and value dimension.
        dtype: of query, key and value.
        is_hip: for AMD GPUs, whose shared memory has no room for a second stage.
    """
    width = triton.next_power_of_2(head_dim) * dtype.itemsize
    rows, columns, warps = TILES[kernel][max(128, width)]
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": warps, "num_stages": 1 if is_hip else 2}


class _Call:
    """What forward and backward pass of one call have in common: arguments of the kernels and their tiles."""

    def __init__(self, operands: SigmoidOperands):
        query, _, value, attention_mask, head_bias, alibi_slopes = operands[:6]
        batch, heads, q_len, head_dim = query.shape
        kv_heads, kv_len, value_dim = value.shape[1:]
        mask_kind, masked_at, mask = "none", 0.0, query
        mask_strides = (0, 0, 0, 0)
        if attention_mask is not None:
            mask = attention_mask.expand(batch, heads, q_len, kv_len)
            mask_strides = mask.stride()
            if mask.dtype == torch.bool:
                mask_kind, mask = "boolean", mask.view(torch.uint8)
            else:
                mask_kind, masked_at = "additive", torch.finfo(mask.dtype).min / 2
        max_distance = UNBOUNDED if operands.sliding_window is None else operands.sliding_window - 1
        slopes = query if alibi_slopes is None else alibi_slopes.float().expand(batch, heads).contiguous()
        self.tensors = (mask, query if head_bias is None else head_bias.float().contiguous(), slopes)
        self.arguments = (
            *mask_strides,
            heads,
            operands.scaling,
            operands.bias,
            masked_at,
            heads,
            heads // kv_heads,
            q_len,
            kv_len,
            operands.query_offset,
            0 if operands.is_causal else -max_distance,
            max_distance,
        )
        self.constants = {
            **dimension_constants(head_dim, value_dim),
            "MASK": mask_kind,
            "HAS_HEAD_BIAS": head_bias is not None,
            "HAS_ALIBI": alibi_slopes is not None,
        }
        self.query_heads, self.kv_heads = batch * heads, batch * kv_heads
        self.q_len, self.kv_len = q_len, kv_len
        self.widest, self.dtype, self.device = max(head_dim, value_dim), query.dtype, query.device

    def launch(self, name: str, tensors, tensor_strides) -> None:
        options = launch_options(name, self.widest, self.dtype, is_hip=torch.version.hip is not None)
        if name == "grad_key_value":
            grid = (triton.cdiv(self.kv_len, options["BLOCK_COLUMNS"]), self.kv_heads)
        else:
            grid = (triton.cdiv(self.q_len, options["BLOCK_ROWS"]), self.query_heads)
        if 0 in grid:
            return
        with on_device(self.device):
            KERNELS[name][grid](*tensors, *self.tensors, *tensor_strides, *self.arguments, **self.constants, **options)


@torch.library.custom_op("hf_attn::sigmoid_attention_triton", mutates_args=(), schema=FORWARD_SCHEMA)
def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others) -> torch.Tensor:
    query, key, value = with_contiguous_rows(query, key, value)
    call = _Call(SigmoidOperands(query, key, value, *others))
    output = new_output(query, value)
    tensors = (query, key, value, output)
    call.launch("forward", tensors, strides(*tensors))
    return output


@_forward.register_fake
def _(query, key, value, *others):
    return new_output(query, value)


@torch.library.custom_op("hf_attn::sigmoid_attention_triton_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward_op(
    grad_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_output, query, key, value = with_contiguous_rows(grad_output, query, key, value)
    call = _Call(SigmoidOperands(query, key, value, *others))
    gradients = grad_query, grad_key, grad_value = new_gradients(query, key, value)
    operands = (query, key, value, grad_output)
    call.launch("grad_query", (*operands, grad_query), strides(*operands, grad_query))
    call.launch("grad_key_value", (*operands, grad_key, grad_value), strides(*operands, grad_key, grad_value))
    return tuple(gradients)


@_backward_op.register_fake
def _(grad_output, query, key, value, *others):
    return tuple(new_gradients(query, key, value))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _backward(ctx, grad_output):
    return *_backward_op(grad_output, *ctx.saved_tensors, *ctx.numbers), *(None,) * 8


_forward.register_autograd(_backward, setup_context=_setup_context)


def sigmoid_attention_triton(call: SigmoidCall) -> torch.Tensor:
    """Sigmoid attention on a GPU with memory linear in the sequence lengths, forward and backward.

    Query, key and value get gradients. Products of float32 input are computed in float32, not in TF32.

    Args:
        call: one that [`hf_attn.kernels.sigmoid.call.check_triton`] does not refuse.

    Returns:
        Output `(batch, heads, q_len, value_dim)` in the dtype of the query.
    """
    return _forward(*call.operands())
