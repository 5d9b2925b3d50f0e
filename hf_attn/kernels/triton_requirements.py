"""Requirements of all Triton kernels. Importing this module needs neither triton nor a GPU."""

import importlib.util
import os

import torch

from .call import AttentionCall, Refusal


def refusal_of_triton(call: AttentionCall, max_head_dim: int) -> Refusal | None:
    """Why no Triton kernel can run on the tensors of a call; None if one can.

    Args:
        max_head_dim: largest head dimension of query, key and value that the kernel can keep on the chip.
    """
    device, dtype = call.query.device.type, call.query.dtype
    head_dim = max(call.query.shape[-1], call.value.shape[-1])
    if importlib.util.find_spec("triton") is None:
        return Refusal("triton is not installed (`pip install hf_attn[kernels]`)")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return Refusal(f"it runs on a GPU, and the tensors are on {device!r}")
    if device != "cuda" and dtype == torch.bfloat16:
        return Refusal("triton's interpreter does not multiply bfloat16 correctly")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Refusal(f"it supports float16, bfloat16 and float32, got {dtype}")
    if head_dim > max_head_dim:
        return Refusal(f"it supports head dimensions up to {max_head_dim}, got {head_dim}")
    return None
