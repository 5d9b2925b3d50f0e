"""A call of sigmoid attention, and the checks of its fused kernels."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..call import AttentionCall, Refusal, refusal_of_fused
from ..triton_requirements import refusal_of_triton


#: What the Triton kernels keep of one row on the chip.
MAX_TRITON_HEAD_DIM = 256


class SigmoidOperands(NamedTuple):
    """The arguments of the fused kernels as operators of PyTorch take them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None
    head_bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    scaling: float
    bias: float
    is_causal: bool
    sliding_window: int | None
    query_offset: int


#: the same for `torch.library`
OPERANDS_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? attention_mask, Tensor? head_bias, Tensor? alibi_slopes, "
    "float scaling, float bias, bool is_causal, SymInt? sliding_window, SymInt query_offset"
)
FORWARD_SCHEMA = f"({OPERANDS_SCHEMA}) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad_output, {OPERANDS_SCHEMA}) -> (Tensor, Tensor, Tensor)"


@dataclass(eq=False)
class SigmoidCall(AttentionCall):
    """A call of sigmoid attention.

    Attributes:
        bias: `b`, one number or one for each head `(heads,)`; it is not scaled.
        alibi_slopes: `(heads,)` or `(batch, heads)`, slope of the penalty on the distance in tokens.
        query_offset: position of the first query among the keys; `kv_len - q_len` if not given.
    """

    bias: float | torch.Tensor = 0.0
    alibi_slopes: torch.Tensor | None = None
    query_offset: int | torch.Tensor | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.query_offset is None:
            self.query_offset = self.key.shape[2] - self.query.shape[2]

    def operands(self) -> SigmoidOperands:
        is_tensor = isinstance(self.bias, torch.Tensor)
        return SigmoidOperands(
            self.query,
            self.key,
            self.value,
            self.attention_mask,
            self.bias if is_tensor else None,
            self.alibi_slopes,
            self.scaling,
            0.0 if is_tensor else self.bias,
            self.is_causal,
            self.sliding_window,
            self.query_offset,
        )


def check_blockwise(call: SigmoidCall) -> Refusal | None:
    """Whether [`hf_attn.kernels.sigmoid.blockwise.sigmoid_attention_blockwise`] supports a call."""
    refusal = refusal_of_fused(call)
    if refusal is not None:
        return refusal
    if isinstance(call.query_offset, torch.Tensor):
        return Refusal("it needs query_offset as a number, not as a tensor")
    for name in ("bias", "attention_mask", "alibi_slopes"):
        argument = getattr(call, name)
        if isinstance(argument, torch.Tensor) and argument.requires_grad and torch.is_grad_enabled():
            return Refusal(f"it does not compute a gradient for {name}, which requires one")
    return None


def check_triton(call: SigmoidCall) -> Refusal | None:
    """Whether [`hf_attn.kernels.sigmoid.triton.sigmoid_attention_triton`] supports a call."""
    return check_blockwise(call) or refusal_of_triton(call, MAX_TRITON_HEAD_DIM)
