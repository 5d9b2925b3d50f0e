"""Attention in the windows of image restoration: softmax with a bias for the relative position of each pair.

    A = softmax(scaling * Q K^T + position bias + mask);  O = A V

The names are those of transformers' implementations of softmax attention.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import nn
from transformers.integrations.flex_attention import flex_attention_forward

from ..kernels.call import AttentionCall, Refusal
from .dispatch import AttentionFunction, Implementation
from .softmax import eager_attention_forward


@dataclass(eq=False)
class WindowCall(AttentionCall):
    """A call for a batch of windows that share their mask.

    Attributes:
        position_bias: `(1, heads, q_len, kv_len)`, added to the logits of every window.
        module: the attention layer, from which FlexAttention reads whether it is in training mode.
    """

    _: KW_ONLY
    position_bias: torch.Tensor
    module: nn.Module

    @property
    def bias(self) -> torch.Tensor:
        """Sum of position bias and (additive) mask, `(1, heads, q_len, kv_len)`."""
        return self.position_bias if self.attention_mask is None else self.position_bias + self.attention_mask


def window_attention_eager(call: WindowCall, found: None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification."""
    output, weights = eager_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        call.attention_mask,
        scaling=call.scaling,
        dropout=call.dropout,
        position_bias=call.position_bias,
    )
    return output.transpose(1, 2), weights


def _sdpa(call: WindowCall, found: None) -> tuple[torch.Tensor, None]:
    output = nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=call.bias, dropout_p=call.dropout, scale=call.scaling
    )
    return output, None


def _check_flex(call: WindowCall) -> Refusal | None:
    if call.query.device.type == "cpu" and call.needs_gradient:
        return Refusal("flex_attention has no backward pass on the CPU; call the model under torch.no_grad()")
    return None


def _flex(call: WindowCall, found: None) -> tuple[torch.Tensor, None]:
    # Its kernel for the CPU writes out of bounds with both a bias and a mask (PyTorch 2.14), so that they are one. It looks
    # the bias up by window; the others broadcast it.
    bias = call.bias.expand(len(call.query), -1, -1, -1)
    if call.query.device.type == "cpu":
        # Nor is it compiled for lengths that vary; the number of windows may.
        for states in (call.query, call.key, call.value):
            torch._dynamo.mark_static(states, 2)
        torch._dynamo.mark_static(bias, (2, 3))
    output, _ = flex_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        None,
        scaling=call.scaling,
        position_bias=bias,
        dropout=call.dropout,
    )
    return output.transpose(1, 2), None


class _WindowAttention(AttentionFunction):
    automatic = "sdpa"


WINDOW = _WindowAttention(
    name="window",
    call=WindowCall,
    implementations=(
        Implementation("sdpa", _sdpa),
        Implementation("flex_attention", _flex, _check_flex, gpu_kernel=True),
        Implementation("eager", window_attention_eager),
    ),
)
