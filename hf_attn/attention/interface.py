"""Attention functions with several implementations as functions of transformers' attention interface.

A [`Mechanism`] is registered as `"<mechanism>"`, which takes the first implementation that supports the call, and as
`"<mechanism>_<implementation>"`, which pins one and raises if it does not support the call. What a name means never depends on
which implementation computes it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from ..kernels.call import AttentionCall
from .dispatch import AttentionFunction


#: keyword arguments by which some models of transformers change what their attention computes
RESULT_CHANGING_ARGUMENTS = ("softcap", "s_aux", "position_bias", "cache")


def no_arguments(module: nn.Module, kwargs: dict) -> dict:
    """For a mechanism that takes nothing beyond an [`AttentionCall`]."""
    return {}


def no_fields(heads: int, kv_len: int) -> dict:
    """The example of such a mechanism."""
    return {}


@dataclass(frozen=True)
class Mechanism(AttentionFunction):
    """An attention mechanism that models use by name.

    Attributes:
        arguments: `(module, keyword arguments of the call) -> further fields of the call`. Takes what it supports out of
            the keyword arguments, and so decides what is refused.
        mask_function: creates the mask in the form that the implementations take.
        examples: name -> `(heads, kv_len) -> further fields of a call` with two rows; what
            [`hf_attn.attention.conformance`] compares the implementations on.
    """

    arguments: Callable[[nn.Module, dict], dict] = no_arguments
    mask_function: Callable = sdpa_mask
    examples: Mapping[str, Callable[[int, int], dict]] = field(default_factory=lambda: {"plain": no_fields})

    @property
    def automatic(self) -> str:
        return self.name

    def name_of(self, implementation) -> str:
        return f"{self.name}_{implementation.name}"

    def attention_function(self, name: str) -> Callable:
        """The function registered under `name` (one of [`names`]), with transformers' attention signature."""
        self.implementation(name)

        def attention_forward(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float | None = None,
            dropout: float = 0.0,
            **kwargs,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            call = self.make_call(module, name, query, key, value, attention_mask, scaling, dropout, **kwargs)
            output, weights = self(call, name)
            return output.transpose(1, 2).contiguous(), weights

        attention_forward.__name__ = f"{name}_attention_forward"
        return attention_forward

    def make_call(
        self,
        module: nn.Module,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        dropout: float,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        **kwargs,
    ) -> AttentionCall:
        """Build a call of this mechanism from the arguments that transformers passes to an attention function.

        Raises:
            ValueError: for unsupported arguments that would change the result.
        """
        is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        # Under the convention of `sdpa_mask` a missing mask means: causal if there are several queries, the first of which
        # is at position 0 (further keys are unused slots of a static cache), else all keys.
        is_causal = bool(is_causal) and query.shape[2] > 1 and attention_mask is None
        if is_causal and key.shape[2] > query.shape[2]:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        # A mask made by transformers holds the window already.
        sliding_window = sliding_window if attention_mask is None else None
        arguments = self.arguments(module, kwargs)
        refused = [name for name in RESULT_CHANGING_ARGUMENTS if kwargs.get(name) is not None]
        # Decoder layers hand on the cache that they have updated. A paged cache, which is not a `Cache`, is another matter:
        # there the attention function would have to write keys and values.
        if isinstance(kwargs.get("cache"), Cache):
            refused.remove("cache")
        if refused:
            raise ValueError(
                f"attn_implementation={name!r} does not support {', '.join(refused)}, which {type(module).__name__} "
                "passes and which would change the result. Call the model without it. If the model always passes it, "
                "load the model without attn_implementation."
            )
        if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
            attention_mask = _within_sequences(query, key, cu_seq_lens_q, cu_seq_lens_k, attention_mask, is_causal)
            is_causal = False
        return self.call(
            query,
            key,
            value,
            scaling=scaling,
            attention_mask=attention_mask,
            is_causal=is_causal,
            sliding_window=sliding_window,
            dropout=dropout,
            output_weights=bool(output_attentions),
            **arguments,
        )


def _within_sequences(query, key, cu_seq_lens_q, cu_seq_lens_k, attention_mask, is_causal: bool) -> torch.Tensor:
    """The mask of a flattened batch, in which a query attends only to keys of its own sequence.

    If the model has already separated the sequences by their positions, the mask does not change.

    Args:
        cu_seq_lens_q, cu_seq_lens_k: where the sequences of queries and of keys begin, and the end of the last one.
    """
    if query.shape[0] != 1 or cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k contain the bounds of the sequences of a flattened batch. Both are "
            f"needed, and the batch must have one row; this one has {query.shape[0]}. Use DataCollatorWithFlattening, "
            "or padding and an attention_mask."
        )
    q_position, k_position = (torch.arange(states.shape[2], device=query.device) for states in (query, key))
    q_sequence = torch.bucketize(q_position, cu_seq_lens_q[1:], right=True)
    k_sequence = torch.bucketize(k_position, cu_seq_lens_k[1:], right=True)
    allowed = (q_sequence[:, None] == k_sequence)[None, None]
    if is_causal:
        allowed = allowed & (q_position[:, None] >= k_position)
    if attention_mask is None:
        return allowed
    if attention_mask.dtype == torch.bool:
        return attention_mask & allowed
    return attention_mask.masked_fill(~allowed, torch.finfo(attention_mask.dtype).min)


def uses_attention(model: nn.Module, name: str) -> None:
    """Check that `model` really calls the attention function that its configuration names.

    Many models of transformers accept any registered `attn_implementation` and ignore it.

    Args:
        model: a transformers model.
        name: the name passed as `attn_implementation`.

    Raises:
        ValueError: if the configuration holds another name, or if no module of the model goes through transformers'
            attention interface.
    """
    configured = model.config._attn_implementation
    if configured != name:
        raise ValueError(
            f"{type(model).__name__} is configured with attn_implementation={configured!r}, not {name!r}. Load it with "
            f"`from_pretrained(..., attn_implementation={name!r})` or call `model.set_attn_implementation({name!r})`."
        )
    for module in model.modules():
        # The decoder body looks the function up in a method of its own, which families extend.
        for method in (type(module).forward, *(getattr(owner, "attend", None) for owner in type(module).__mro__)):
            code = getattr(inspect.unwrap(method), "__code__", uses_attention.__code__)
            if "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return
    raise ValueError(
        f"{type(model).__name__} ignores attn_implementation: its attention does not use transformers' attention "
        f"interface, so {name!r} would be accepted but never called. Use a model that does, such as Llama, Qwen2, "
        "Mistral, BERT or ViT."
    )
