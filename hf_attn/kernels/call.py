"""One call of an attention function: its arguments, and the reason why an implementation refuses it."""

from dataclasses import KW_ONLY, dataclass

import torch


@dataclass(eq=False)
class AttentionCall:
    """The arguments of one call, which the checks read and the implementations compute with.

    A mechanism with further arguments has a subclass with further fields.

    Attributes:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`; head `h` uses key/value head `h // (heads // kv_heads)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        scaling: factor of the logits, `head_dim ** -0.5` if not given.
        attention_mask: broadcastable to `(batch, heads, q_len, kv_len)`; boolean (`True`: may attend) or additive,
            where entries at half of the dtype's minimum or below mean masked.
        is_causal: a query attends to the keys up to its own position; the queries are the last `q_len` tokens.
        sliding_window: a query attends only to keys at a smaller distance than this.
        dropout: probability of dropping a weight.
        output_weights: whether the weights are requested.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    _: KW_ONLY
    scaling: float | None = None
    attention_mask: torch.Tensor | None = None
    is_causal: bool = False
    sliding_window: int | None = None
    dropout: float = 0.0
    output_weights: bool = False

    def __post_init__(self):
        if self.scaling is None:
            self.scaling = self.query.shape[-1] ** -0.5

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (self.query, self.key, self.value))

    def repeated_heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value with as many heads as the query."""
        groups = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(groups, dim=1), self.value.repeat_interleave(groups, dim=1)


@dataclass(frozen=True)
class Refusal:
    """Result of a check if its implementation does not support a call.

    Attributes:
        reason: continues the sentence "does not support this call: ".
    """

    reason: str


def refusal_of_fused(call: AttentionCall) -> Refusal | None:
    """The reason why no fused kernel supports a call; None if one can."""
    if call.dropout:
        return Refusal(f"it does not support dropout, got dropout={call.dropout}")
    if call.output_weights:
        return Refusal("it does not compute the attention weights, which were requested")
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        dtypes = f"{call.query.dtype}, {call.key.dtype} and {call.value.dtype}"
        return Refusal(f"query, key and value must have the same dtype, got {dtypes}")
    return None
