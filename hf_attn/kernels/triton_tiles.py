"""Functions that the Triton kernels share."""

import contextlib

import torch
import triton
import triton.language as tl


@triton.jit
def load_rows(pointer, index, stride, length, dims, DIM: tl.constexpr, EDGE: tl.constexpr):
    """Rows `index` of a matrix whose last dimension is contiguous; zeros beyond its bounds."""
    mask = dims[None, :] < DIM
    if EDGE:
        mask = mask & (index[:, None] >= 0) & (index[:, None] < length)
    return tl.load(pointer + index[:, None] * stride + dims[None, :], mask=mask, other=0.0)


def strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, head and row of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def with_contiguous_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def new_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In memory `(batch, q_len, heads, value_dim)`, which is how models go on with it."""
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)


def new_gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dimension_constants(head_dim: int, value_dim: int) -> dict[str, int]:
    """The dimensions of a head, and the powers of two that a tile takes for them."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_VALUE_DIM": max(16, triton.next_power_of_2(value_dim)),
    }
