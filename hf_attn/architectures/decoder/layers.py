"""Parts of a decoder or encoder layer that families replace: the mixer, the feed-forward block, the norms."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache import ValueLayer, cache_values, takes_cache
from .configuration import DecoderConfig


def make_norm(config: DecoderConfig, size: int | None = None, eps: float | None = None) -> nn.Module:
    """The norm that a configuration names.

    Args:
        config: says which.
        size: number of channels, `hidden_size` if not given.
        eps: `rms_norm_eps` if not given.
    """
    size = config.hidden_size if size is None else size
    eps = config.rms_norm_eps if eps is None else eps
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(size, eps=eps, bias=config.norm_bias)
    return LlamaRMSNorm(size, eps=eps)


class PlainMLP(nn.Module):
    """Feed-forward block without a gate, `down(act(up(x)))`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class Mixer(nn.Module):
    """What mixes the tokens of a layer. `forward` returns the output and the attention weights, or `None` for them.

    Attributes:
        cache_kind: what the layer keeps of earlier tokens: `None` for keys and values, `ValueLayer`, `StateLayer`, or a
            subclass of these.
        mask_kind: the mask that `forward` gets as `attention_mask`: `"full_attention"` or `"sliding_attention"` for one of
            pairs of tokens in the form of the attention implementation; `"padding"` for boolean `(batch, length)`, false for
            the padding of the input, or `None` if there is none.
    """

    cache_kind: type | None = None
    mask_kind: str = "full_attention"

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx


class DecoderAttention(Mixer):
    """Attention with grouped heads, rotary embedding if the model has one, and a cache.

    Families replace one of its steps: the projections (`queries_and_keys`, `values`), what computes the output
    (`attend`), or what `eager` means (`eager_attention_forward`).

    Args:
        config: configuration of the model.
        layer_idx: number of the layer, from 0.
        has_queries_and_keys: whether the mixer has queries and keys of its own. Without them it keeps values only.
    """

    #: what computes `attn_implementation="eager"`
    eager_attention_forward = staticmethod(eager_attention_forward)

    def __init__(self, config: DecoderConfig, layer_idx: int, has_queries_and_keys: bool = True):
        super().__init__(config, layer_idx)
        if not has_queries_and_keys:
            self.cache_kind = ValueLayer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        self.mask_kind = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.mask_kind == "sliding_attention" else None

        query_size, key_value_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        if has_queries_and_keys:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
            if config.qk_norm:
                self.q_norm, self.k_norm = make_norm(config, self.head_dim), make_norm(config, self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: `(batch, length, hidden_size)`, normalised.
            position_embeddings: cosines and sines of the rotary embedding, if there is one.
            attention_mask: mask over all keys in the form of the attention implementation.
            cache: earlier keys and values.

        Returns:
            Output `(batch, length, hidden_size)`, and weights `(batch, heads, length, keys)` if they were computed.
        """
        query_states, key_states = self.queries_and_keys(hidden_states, position_embeddings)
        value_states = self.values(hidden_states)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
        attn_output, attn_weights = self.attend(query_states, key_states, value_states, attention_mask, **kwargs)
        return self.output(attn_output), attn_weights

    def heads(self, projection: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
        """A projection `(batch, length, heads * head_dim)` by heads, `(batch, heads, length, head_dim)`."""
        return projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries_and_keys(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `(batch, heads, length, head_dim)` and keys `(batch, kv_heads, length, head_dim)`, with positions."""
        query_states, key_states = self.heads(self.q_proj, hidden_states), self.heads(self.k_proj, hidden_states)
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        if position_embeddings is None:
            return query_states, key_states
        return apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

    def values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Values `(batch, kv_heads, length, head_dim)`."""
        return self.heads(self.v_proj, hidden_states)

    def cached_values(self, value_states: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """All values, for a mixer without keys; the input's are added to the cache."""
        return value_states if cache is None else cache_values(cache, value_states, self.layer_idx)

    def attend(
        self,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output `(batch, length, heads, head_dim)` of the attention function of the configuration, and its weights."""
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager_attention_forward
        )
        return attention_function(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

    def output(self, attn_output: torch.Tensor) -> torch.Tensor:
        """Output projection of `(batch, length, heads, head_dim)`."""
        return self.o_proj(attn_output.flatten(2).contiguous())


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer, `x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = self.make_mixer(config, layer_idx)
        self.mlp = self.make_mlp(config, layer_idx)
        self.input_layernorm = self.make_norm(config)
        self.post_attention_layernorm = self.make_norm(config)

    def make_mixer(self, config: DecoderConfig, layer_idx: int) -> Mixer:
        """The mixer of a layer."""
        return DecoderAttention(config, layer_idx)

    def make_mlp(self, config: DecoderConfig, layer_idx: int) -> nn.Module:
        """The feed-forward block of a layer."""
        return LlamaMLP(config) if config.gated_mlp else PlainMLP(config)

    def make_norm(self, config: DecoderConfig) -> nn.Module:
        """A norm of the residual stream."""
        return make_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """Args:
        hidden_states: `(batch, length, hidden_size)`.
        kwargs: arguments of the mixer.
        """
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
