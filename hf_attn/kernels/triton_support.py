"""Triton kernels. Importing this package needs neither triton nor a GPU; importing a kernel's module needs triton."""

import importlib.util
import os

import torch

from .landmark.blockwise import landmark_block_size, supports_landmark_blockwise
from .sigmoid.arguments import reason_not_fused


#: What the kernels keep of one row on the chip.
MAX_HEAD_DIM = 256
#: and, with a tile of the size of a block, those of landmark attention
MAX_LANDMARK_HEAD_DIM = 128
LANDMARK_BLOCK_SIZES = (16, 32, 64, 128)


def _reason_not_here(query: torch.Tensor, value: torch.Tensor, max_head_dim: int) -> str:
    """Why no kernel can run on these tensors; empty if one can."""
    head_dim = max(query.shape[-1], value.shape[-1])
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install hf_attn[kernels]`)"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on a GPU, and the tensors are on {query.device.type!r}"
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 or float32, got {query.dtype}"
    if head_dim > max_head_dim:
        return f"it serves head dimensions up to {max_head_dim}, got {head_dim}"
    return ""


def supports_sigmoid_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    bias: float | torch.Tensor = 0.0,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    dropout: float = 0.0,
    output_weights: bool = False,
) -> tuple[bool, str]:
    """Whether :func:`hf_attn.kernels.sigmoid.triton.sigmoid_attention_triton` can serve a call, and if not, why."""
    reason = reason_not_fused(
        query,
        key,
        value,
        bias=bias,
        attention_mask=attention_mask,
        alibi_slopes=alibi_slopes,
        query_offset=query_offset,
        dropout=dropout,
        output_weights=output_weights,
    )
    reason = reason or _reason_not_here(query, value, MAX_HEAD_DIM)
    return not reason, reason


def landmark_tile(is_landmark: torch.Tensor | None, kv_len: int) -> int | None:
    """Size of the tiles for regular blocks; for fewer keys than a block has, any tile that holds them does."""
    size = landmark_block_size(is_landmark, kv_len)
    if size == kv_len + 1:
        return next((tile for tile in LANDMARK_BLOCK_SIZES if tile > kv_len), None)
    return size if size in LANDMARK_BLOCK_SIZES else None


def supports_landmark_triton(query, key, value, *, is_landmark=None, **arguments) -> tuple[bool, str]:
    """Whether :func:`hf_attn.kernels.landmark.triton.landmark_attention_triton` can serve a call, and if not, why."""
    _, reason = supports_landmark_blockwise(query, key, value, is_landmark=is_landmark, **arguments)
    if not reason and landmark_tile(is_landmark, key.shape[2]) is None:
        size = landmark_block_size(is_landmark, key.shape[2])
        found = "there is no landmark" if size == key.shape[2] + 1 else f"they are {size} (mem_freq={size - 1})"
        reason = (
            f"its blocks are {', '.join(map(str, LANDMARK_BLOCK_SIZES))} tokens long with the landmark, and {found}; "
            "train with mem_freq=63, for example"
        )
    reason = reason or _reason_not_here(query, value, MAX_LANDMARK_HEAD_DIM)
    return not reason, reason
