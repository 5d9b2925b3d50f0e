"""A layer of tables in the place of a linear layer (MemoryFormer, arXiv 2411.12992)."""

import os
from typing import Literal

import torch
from torch import nn

from ..kernels.memory import hash_chunks, lookup


BUCKET_WEIGHTS = ("l1_scaled", "probability")


def check_code(in_features: int, num_tables: int, code_length: int, name: str = "in_features") -> None:
    """Raise `ValueError` if a vector cannot be split into chunks of `code_length` channels."""
    if code_length < 1 or num_tables < 1 or num_tables * code_length != in_features:
        raise ValueError(
            f"num_tables * code_length must be {name}: {num_tables} * {code_length} = {num_tables * code_length}, "
            f"not {in_features}. Choose a code_length that divides it."
        )


def _available_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


class MemoryLayer(nn.Module):
    """Rows of tables, picked by the signs of chunks of the input, in the place of a matrix product.

        y = sum_k w(z_k) T_k[index(z_k)] + bias

    Chunk `z_k` are channels `k * code_length` to `(k + 1) * code_length - 1`; bit i of its index is 1 for a channel that is
    not negative, the first channel being the most significant bit. Table k are rows `k * 2**code_length` and on of `tables`.

    A token touches `num_tables` rows of each table's `2**code_length`, so the gradient of the tables is sparse. With
    `sparse_gradients` it is a sparse tensor, which only optimisers for such tensors take (`torch.optim.SparseAdam`, SGD), and
    which `clip_grad_norm_` does not; see [`~hf_attn.training.memory_optimizer.TableOptimizer`].

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        code_length: channels of a chunk.
        num_tables: number of chunks, `in_features / code_length` if not given.
        bias: whether there is a bias.
        bucket_weight: w is the probability of the bucket among all, `"probability"` (the paper, equation 6), or that times
            the sum of magnitudes of the chunk, `"l1_scaled"` (the public code).
        temperature: of the probability; the other weight has none.
        sparse_gradients: whether the gradient of the tables is a sparse tensor.

    Raises:
        ValueError: if the input cannot be split into the chunks, or the tables do not fit into memory.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        code_length: int = 8,
        num_tables: int | None = None,
        bias: bool = True,
        bucket_weight: Literal["l1_scaled", "probability"] = "l1_scaled",
        temperature: float = 1.0,
        sparse_gradients: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_tables = in_features // code_length if num_tables is None and code_length > 0 else num_tables or 0
        check_code(in_features, num_tables, code_length)
        if bucket_weight not in BUCKET_WEIGHTS:
            raise ValueError(f"bucket_weight must be one of {', '.join(BUCKET_WEIGHTS)}, got {bucket_weight!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        self.in_features, self.out_features = in_features, out_features
        self.num_tables, self.code_length = num_tables, code_length
        self.bucket_weight, self.temperature = bucket_weight, temperature
        self.sparse_gradients = sparse_gradients
        self._check_memory(device, dtype)
        self.tables = nn.Parameter(torch.empty(num_tables << code_length, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _check_memory(self, device, dtype) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        available = _available_memory() if device.type == "cpu" else None
        size = torch.finfo(dtype or torch.get_default_dtype()).bits // 8
        needed = (self.num_tables << self.code_length) * self.out_features * size
        if available is not None and needed > available:
            raise ValueError(
                f"{self.num_tables} tables of 2**{self.code_length} rows of {self.out_features} need "
                f"{needed / 2**30:,.1f} GiB, and this machine has {available / 2**30:,.1f} GiB. Choose a shorter code_length."
            )

    def reset_parameters(self) -> None:
        """Tables `0.02 N(0, 1)` and biases `0.001 N(0, 1)`, as in the public code."""
        nn.init.normal_(self.tables, std=0.02)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.001)

    def hash(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and weights `(tokens, num_tables)` of an input `(..., in_features)`, for [`fetch`] of this layer and of others
        with the same code."""
        if hidden_states.shape[-1] != self.in_features:
            raise ValueError(f"The last dimension must be {self.in_features}, got shape {tuple(hidden_states.shape)}.")
        flat = hidden_states.reshape(-1, self.in_features)
        return hash_chunks(flat, self.code_length, self.bucket_weight, self.temperature)

    def fetch(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Output `(tokens, out_features)` of hashed tokens."""
        output = lookup(rows, weights, self.tables, self.sparse_gradients)
        return output if self.bias is None else output + self.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Input `(..., in_features)`, output `(..., out_features)`."""
        output = self.fetch(*self.hash(hidden_states))
        return output.view(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_tables={self.num_tables}, "
            f"code_length={self.code_length}, bias={self.bias is not None}, bucket_weight={self.bucket_weight!r}"
        )
