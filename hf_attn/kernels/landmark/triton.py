"""Landmark attention with regular blocks in Triton, forward and backward (arXiv 2305.16300, the fused form).

The landmark is the last token of each block of `BLOCK` keys. To a query, an earlier block is one entry of its softmax, with
the landmark's score as logit and `o_b = sum_j s_j v_j` as value, s the softmax within the block; its own block is ordinary
causal attention without the landmark. The forward pass saves the logarithm of each query's normaliser. With p the weight of
a block, `D = dO . O` and `D_b = dO . o_b`:

    dV_j = p s_j dO;  dscore_landmark = p (D_b - D);  dscore_j = p s_j (dO . v_j - D_b)

A tile of queries is a block of the sequence too, so that it has one own block.
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
from .call import LandmarkCall


@triton.jit
def _scores(queries, keys, rows, columns, mask, stride_mask_row, stride_mask_column, scaling, first, kv_len,
            BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """Scaled products of a tile; minus infinity for masked pairs.

    Of the own block these are later keys and the landmark, of any block those that the mask forbids.

    Args:
        rows: positions of the queries in the sequence, (BLOCK,); the first one of the input is `first`.
    """
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
    if OWN:
        is_landmark = columns % BLOCK == BLOCK - 1
        seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] < kv_len) & (is_landmark[None, :] == 0)
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_MASK:
        row_pointer = mask + (rows[:, None] - first).to(tl.int64) * stride_mask_row
        inside = (rows[:, None] >= first) & (rows[:, None] < kv_len) & (columns[None, :] < kv_len)
        allowed = tl.load(row_pointer + columns[None, :] * stride_mask_column, mask=inside, other=0)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    return scores


@triton.jit
def _finite(maximum):
    """A maximum that can be subtracted, also for rows without allowed keys."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _split(scores, BLOCK: tl.constexpr):
    """The score of the landmark, and the softmax of the regular tokens, zero for rows without allowed keys."""
    is_landmark = tl.arange(0, BLOCK)[None, :] == BLOCK - 1
    gate = tl.max(tl.where(is_landmark, scores, float("-inf")), 1)
    scores = tl.where(is_landmark, float("-inf"), scores)
    exponentials = tl.exp(scores - _finite(tl.max(scores, 1))[:, None])
    total = tl.sum(exponentials, 1)
    return gate, exponentials / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _forward_kernel(
    query, key, value, output, normalisers, mask,
    stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head, stride_key,
    stride_value_batch, stride_value_head, stride_value, stride_output_batch, stride_output_head, stride_output,
    stride_mask_batch, stride_mask_row, stride_mask_column,
    scaling, heads, groups, q_len, kv_len,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = kv_len - q_len
    own = first // BLOCK + tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head // groups * stride_key_head
    value += batch * stride_value_batch + head // groups * stride_value_head
    output += batch * stride_output_batch + head * stride_output_head
    mask += batch * stride_mask_batch

    tile = tl.arange(0, BLOCK)
    rows = own * BLOCK + tile
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    queries = load_rows(query, rows - first, stride_query, q_len, dims, HEAD_DIM, True)
    accumulator = tl.zeros([BLOCK, BLOCK_VALUE_DIM], dtype=tl.float32)
    maximum = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)

    for block in range(own):
        columns = block * BLOCK + tile
        keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, False)
        values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, False)
        scores = _scores(queries, keys, rows, columns, mask, stride_mask_row, stride_mask_column, scaling, first,
                         kv_len, BLOCK, HAS_MASK, False)  # fmt: skip
        gate, inside = _split(scores, BLOCK)
        new_maximum = tl.maximum(maximum, gate)
        decay = tl.exp(maximum - _finite(new_maximum))
        weight = tl.exp(gate - _finite(new_maximum))
        total = total * decay + weight
        read = tl.dot(inside.to(values.dtype), values, input_precision="ieee")
        accumulator = accumulator * decay[:, None] + weight[:, None] * read
        maximum = new_maximum

    columns = own * BLOCK + tile
    keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, True)
    values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, True)
    scores = _scores(queries, keys, rows, columns, mask, stride_mask_row, stride_mask_column, scaling, first,
                     kv_len, BLOCK, HAS_MASK, True)  # fmt: skip
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    decay = tl.exp(maximum - _finite(new_maximum))
    weights = tl.exp(scores - _finite(new_maximum)[:, None])
    total = total * decay + tl.sum(weights, 1)
    # The weights are divided before they are rounded.
    safe_total = tl.where(total == 0.0, 1.0, total)
    accumulator *= (decay / safe_total)[:, None]
    weights /= safe_total[:, None]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")

    in_input = (rows >= first) & (rows < kv_len)
    tl.store(
        output + (rows - first)[:, None] * stride_output + value_dims[None, :],
        accumulator.to(output.dtype.element_ty),
        mask=in_input[:, None] & (value_dims[None, :] < VALUE_DIM),
    )
    # Infinity makes all weights zero for a query without allowed keys.
    normaliser = tl.where(total == 0.0, float("inf"), _finite(new_maximum) + tl.log(safe_total))
    tl.store(normalisers + tl.program_id(1) * q_len + rows - first, normaliser, mask=in_input)


@triton.jit
def _grad_scores(scores, grad_weights, normaliser, correction, BLOCK: tl.constexpr, OWN: tl.constexpr):
    """Gradient of the scores of a tile, and the weights of its keys.

    Args:
        grad_weights: dO . v_j of each pair.
        normaliser, correction: of each query, the logarithm of its normaliser and D.
    """
    if OWN:
        weights = tl.exp(scores - normaliser[:, None])
        # A weight of one is that of the only key and has no gradient; the difference would be a rounding error.
        grad_scores = tl.where(weights == 1.0, 0.0, weights * (grad_weights - correction[:, None]))
    else:
        gate, inside = _split(scores, BLOCK)
        gate_weight = tl.exp(gate - normaliser)
        weights = gate_weight[:, None] * inside
        block_correction = tl.sum(inside * grad_weights, 1)
        grad_gate = tl.where(gate_weight == 1.0, 0.0, gate_weight * (block_correction - correction))
        is_landmark = tl.arange(0, BLOCK)[None, :] == BLOCK - 1
        grad_scores = weights * (grad_weights - block_correction[:, None])
        grad_scores = tl.where(is_landmark, grad_gate[:, None], grad_scores)
    return grad_scores, weights


@triton.jit
def _grad_query_block(
    accumulator, queries, grad_outputs, normaliser, correction, rows, block, key, value, mask,
    stride_key, stride_value, stride_mask_row, stride_mask_column, scaling, first, kv_len,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    columns = block * BLOCK + tl.arange(0, BLOCK)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, OWN)
    values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, OWN)
    scores = _scores(queries, keys, rows, columns, mask, stride_mask_row, stride_mask_column, scaling, first,
                     kv_len, BLOCK, HAS_MASK, OWN)  # fmt: skip
    grad_weights = tl.dot(grad_outputs, tl.trans(values), input_precision="ieee")
    grad_scores, _ = _grad_scores(scores, grad_weights, normaliser, correction, BLOCK, OWN)
    return tl.dot(grad_scores.to(keys.dtype), keys, accumulator, input_precision="ieee")


@triton.jit
def _grad_query_kernel(
    query, key, value, grad_output, grad_query, normalisers, corrections, mask,
    stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head, stride_key,
    stride_value_batch, stride_value_head, stride_value, stride_output_batch, stride_output_head, stride_output,
    stride_grad_batch, stride_grad_head, stride_grad,
    stride_mask_batch, stride_mask_row, stride_mask_column,
    scaling, heads, groups, q_len, kv_len,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = kv_len - q_len
    own = first // BLOCK + tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head // groups * stride_key_head
    value += batch * stride_value_batch + head // groups * stride_value_head
    grad_output += batch * stride_output_batch + head * stride_output_head
    grad_query += batch * stride_grad_batch + head * stride_grad_head
    mask += batch * stride_mask_batch

    rows = own * BLOCK + tl.arange(0, BLOCK)
    in_input = (rows >= first) & (rows < kv_len)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    queries = load_rows(query, rows - first, stride_query, q_len, dims, HEAD_DIM, True)
    grad_outputs = load_rows(grad_output, rows - first, stride_output, q_len, value_dims, VALUE_DIM, True)
    at = tl.program_id(1) * q_len + rows - first
    normaliser = tl.load(normalisers + at, mask=in_input, other=float("inf"))
    correction = tl.load(corrections + at, mask=in_input, other=0.0)
    accumulator = tl.zeros([BLOCK, BLOCK_DIM], dtype=tl.float32)
    for block in range(own):
        accumulator = _grad_query_block(
            accumulator, queries, grad_outputs, normaliser, correction, rows, block, key, value, mask,
            stride_key, stride_value, stride_mask_row, stride_mask_column, scaling, first, kv_len,
            HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, HAS_MASK, BLOCK, False,
        )  # fmt: skip
    accumulator = _grad_query_block(
        accumulator, queries, grad_outputs, normaliser, correction, rows, own, key, value, mask,
        stride_key, stride_value, stride_mask_row, stride_mask_column, scaling, first, kv_len,
        HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, HAS_MASK, BLOCK, True,
    )  # fmt: skip
    tl.store(
        grad_query + (rows - first)[:, None] * stride_grad + dims[None, :],
        (accumulator * scaling).to(grad_query.dtype.element_ty),
        mask=in_input[:, None] & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def _grad_key_value_block(
    grad_keys, grad_values, keys, values, columns, tile, query, grad_output, normalisers, corrections, mask,
    stride_query, stride_output, stride_mask_row, stride_mask_column, scaling, first, q_len, kv_len,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    in_input = (rows >= first) & (rows < kv_len)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    queries = load_rows(query, rows - first, stride_query, q_len, dims, HEAD_DIM, True)
    grad_outputs = load_rows(grad_output, rows - first, stride_output, q_len, value_dims, VALUE_DIM, True)
    normaliser = tl.load(normalisers + rows - first, mask=in_input, other=float("inf"))
    correction = tl.load(corrections + rows - first, mask=in_input, other=0.0)
    scores = _scores(queries, keys, rows, columns, mask, stride_mask_row, stride_mask_column, scaling, first,
                     kv_len, BLOCK, HAS_MASK, OWN)  # fmt: skip
    grad_weights = tl.dot(grad_outputs, tl.trans(values), input_precision="ieee")
    grad_scores, weights = _grad_scores(scores, grad_weights, normaliser, correction, BLOCK, OWN)
    grad_values = tl.dot(tl.trans(weights.to(values.dtype)), grad_outputs, grad_values, input_precision="ieee")
    grad_keys = tl.dot(tl.trans(grad_scores.to(keys.dtype)), queries, grad_keys, input_precision="ieee")
    return grad_keys, grad_values


@triton.jit
def _grad_key_value_kernel(
    query, key, value, grad_output, grad_key, grad_value, normalisers, corrections, mask,
    stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head, stride_key,
    stride_value_batch, stride_value_head, stride_value, stride_output_batch, stride_output_head, stride_output,
    stride_grad_key_batch, stride_grad_key_head, stride_grad_key,
    stride_grad_value_batch, stride_grad_value_head, stride_grad_value,
    stride_mask_batch, stride_mask_row, stride_mask_column,
    scaling, heads, groups, q_len, kv_len,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = kv_len - q_len
    kv_heads = heads // groups
    block = tl.program_id(0)
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    key += batch * stride_key_batch + kv_head * stride_key_head
    value += batch * stride_value_batch + kv_head * stride_value_head
    grad_key += batch * stride_grad_key_batch + kv_head * stride_grad_key_head
    grad_value += batch * stride_grad_value_batch + kv_head * stride_grad_value_head
    mask += batch * stride_mask_batch

    columns = block * BLOCK + tl.arange(0, BLOCK)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    keys = load_rows(key, columns, stride_key, kv_len, dims, HEAD_DIM, True)
    values = load_rows(value, columns, stride_value, kv_len, value_dims, VALUE_DIM, True)
    grad_keys = tl.zeros([BLOCK, BLOCK_DIM], dtype=tl.float32)
    grad_values = tl.zeros([BLOCK, BLOCK_VALUE_DIM], dtype=tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        queries = query + batch * stride_query_batch + head * stride_query_head
        grad_outputs = grad_output + batch * stride_output_batch + head * stride_output_head
        at = (batch * heads + head) * q_len
        if block >= first // BLOCK:
            grad_keys, grad_values = _grad_key_value_block(
                grad_keys, grad_values, keys, values, columns, block, queries, grad_outputs,
                normalisers + at, corrections + at, mask,
                stride_query, stride_output, stride_mask_row, stride_mask_column, scaling, first, q_len, kv_len,
                HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, HAS_MASK, BLOCK, True,
            )  # fmt: skip
        for tile in range(tl.maximum(block + 1, first // BLOCK), tl.cdiv(kv_len, BLOCK)):
            grad_keys, grad_values = _grad_key_value_block(
                grad_keys, grad_values, keys, values, columns, tile, queries, grad_outputs,
                normalisers + at, corrections + at, mask,
                stride_query, stride_output, stride_mask_row, stride_mask_column, scaling, first, q_len, kv_len,
                HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, HAS_MASK, BLOCK, False,
            )  # fmt: skip

    in_sequence = columns[:, None] < kv_len
    tl.store(
        grad_key + columns[:, None] * stride_grad_key + dims[None, :],
        (grad_keys * scaling).to(grad_key.dtype.element_ty),
        mask=in_sequence & (dims[None, :] < HEAD_DIM),
    )
    tl.store(
        grad_value + columns[:, None] * stride_grad_value + value_dims[None, :],
        grad_values.to(grad_value.dtype.element_ty),
        mask=in_sequence & (value_dims[None, :] < VALUE_DIM),
    )


KERNELS = {"forward": _forward_kernel, "grad_query": _grad_query_kernel, "grad_key_value": _grad_key_value_kernel}


def launch_options(block_size: int, head_dim: int) -> dict[str, int]:
    """Launch parameters of a kernel, whose tile is a block of `block_size` rows; one stage, for shared memory."""
    return {"num_warps": 8 if block_size * head_dim >= 64 * 128 else 4, "num_stages": 1}


class _Call:
    """What forward and backward pass of one call have in common: arguments of the kernels and their constants."""

    def __init__(self, query, key, value, attention_mask, scaling: float, block_size: int):
        batch, heads, q_len, head_dim = query.shape
        kv_heads, kv_len, value_dim = value.shape[1:]
        mask, mask_strides = query, (0, 0, 0)
        if attention_mask is not None:
            mask = attention_mask.expand(batch, 1, q_len, kv_len).view(torch.uint8)
            mask_strides = (mask.stride(0), *mask.stride()[2:])
        self.mask = mask
        self.arguments = (*mask_strides, scaling, heads, heads // kv_heads, q_len, kv_len)
        self.constants = {
            **dimension_constants(head_dim, value_dim),
            "HAS_MASK": attention_mask is not None,
            "BLOCK": block_size,
        }
        first_block = (kv_len - q_len) // block_size
        blocks = triton.cdiv(kv_len, block_size)
        self.grids = dict.fromkeys(("forward", "grad_query"), (blocks - first_block, batch * heads))
        self.grids["grad_key_value"] = (blocks, batch * kv_heads)
        self.options = launch_options(block_size, max(head_dim, value_dim))
        self.device = query.device

    def launch(self, name: str, tensors, tensor_strides) -> None:
        with on_device(self.device):
            KERNELS[name][self.grids[name]](
                *tensors, self.mask, *tensor_strides, *self.arguments, **self.constants, **self.options
            )


class _LandmarkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attention_mask, scaling, block_size):
        query, key, value = with_contiguous_rows(query, key, value)
        ctx.call = _Call(query, key, value, attention_mask, scaling, block_size)
        output = new_output(query, value)
        normalisers = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        tensors = (query, key, value, output)
        ctx.call.launch("forward", (*tensors, normalisers), strides(*tensors))
        ctx.save_for_backward(query, key, value, output, normalisers)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, normalisers = ctx.saved_tensors
        (grad_output,) = with_contiguous_rows(grad_output)
        corrections = (grad_output.float() * output.float()).sum(-1).contiguous()
        gradients = grad_query, grad_key, grad_value = new_gradients(query, key, value)
        operands, statistics = (query, key, value, grad_output), (normalisers, corrections)
        ctx.call.launch("grad_query", (*operands, grad_query, *statistics), strides(*operands, grad_query))
        ctx.call.launch(
            "grad_key_value", (*operands, grad_key, grad_value, *statistics), strides(*operands, grad_key, grad_value)
        )
        return *gradients, None, None, None


def landmark_attention_triton(call: LandmarkCall, block_size: int) -> torch.Tensor:
    """Causal landmark attention on a GPU with memory linear in the sequence lengths, forward and backward.

    Args:
        call: one that [`hf_attn.kernels.landmark.call.check_triton`] does not refuse.
        block_size: what that returned, a power of two from 16 on: each `block_size`-th key is a landmark.

    Returns:
        Output `(batch, heads, q_len, value_dim)` in the dtype of the query. Products of float32 input are computed in
        float32, not in TF32.
    """
    if call.query.shape[2] == 0:
        return new_output(call.query, call.value)
    return _LandmarkAttention.apply(call.query, call.key, call.value, call.attention_mask, call.scaling, block_size)
