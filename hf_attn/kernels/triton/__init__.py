"""Triton kernels. Importing this package needs neither triton nor a GPU; importing a kernel's module needs triton."""

import importlib.util
import os

import torch

from ..sigmoid_arguments import reason_not_fused


#: What the kernels keep of one row on the chip.
MAX_HEAD_DIM = 256


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
    """Whether :func:`hf_attn.kernels.triton.sigmoid.sigmoid_attention_triton` can serve a call, and if not, why."""
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
    head_dim = max(query.shape[-1], value.shape[-1])
    if reason:
        pass
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (`pip install hf_attn[kernels]`)"
    elif query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"it runs on a GPU, and the tensors are on {query.device.type!r}"
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        reason = "triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers"
    elif query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reason = f"it computes in float16, bfloat16 or float32, got {query.dtype}"
    elif head_dim > MAX_HEAD_DIM:
        reason = f"it serves head dimensions up to {MAX_HEAD_DIM}, got {head_dim}"
    return not reason, reason
