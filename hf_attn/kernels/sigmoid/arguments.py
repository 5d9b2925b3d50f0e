"""What the fused kernels of sigmoid attention have in common in what they can serve."""

import torch


def reason_not_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: float | torch.Tensor,
    attention_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    query_offset: int | torch.Tensor | None,
    dropout: float,
    output_weights: bool,
) -> str:
    """Why no fused kernel of sigmoid attention can serve a call; empty if one can.

    The arguments are those of :func:`hf_attn.attention.sigmoid.sigmoid_attention_eager`.
    """
    if dropout:
        return f"it does not drop attention weights, and dropout={dropout} is asked for"
    if output_weights:
        return "it never holds the attention weights, which are asked for"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if isinstance(query_offset, torch.Tensor):
        return "query_offset is a tensor, and it needs a number"
    for name, argument in (("bias", bias), ("attention_mask", attention_mask), ("alibi_slopes", alibi_slopes)):
        if isinstance(argument, torch.Tensor) and argument.requires_grad and torch.is_grad_enabled():
            return f"it has no gradient for {name}, which requires one"
    return ""
