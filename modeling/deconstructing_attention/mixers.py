"""The mixers of the paper, each in place of the attention of a layer."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from hf_attn.architectures.decoder import DecoderAttention, DecoderConfig, Mixer, StateLayer, takes_cache
from hf_attn.mixers.cumulative_softmax import LOWEST, cumulative_softmax, cumulative_softmax_weights, own_scores
from hf_attn.mixers.taylor import TAYLOR_TERMS, taylor_attention, taylor_weights

from .configuration_deconstructing_attention import STATIC_KINDS
from .static_maps import StaticMap, StaticMapLayer


class MLPMixer(Mixer):
    """No mixing: `o(down(silu(gate(x)) * up(x)))`, with as many parameters as attention."""

    cache_kind, mask_kind = StateLayer, "padding"

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.num_attention_heads * config.head_dim
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
        self.down_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=config.attention_output_bias)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:
        hidden_states = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.o_proj(self.down_proj(hidden_states)), None


class _RecurrentMixer(DecoderAttention):
    """Base class of the mixers with a state of constant size. `eager` computes the map if all tokens are in the input; so does
    an exported graph, whose length may be free, and the number of chunks could not be."""

    cache_kind = StateLayer
    #: names of what it keeps
    state_names: tuple[str, ...]

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mask_kind = "padding"

    def states_of(self, cache: Cache | None) -> dict[str, torch.Tensor] | None:
        """The states of the cache, or `None` without one; raises `ValueError` for those of another mixer."""
        if cache is None:
            return None
        states = cache.layers[self.layer_idx].states
        if states and set(states) != set(self.state_names):
            raise ValueError(
                f"Layer {self.layer_idx} of the cache contains {', '.join(sorted(states))}, the state of another "
                f"mixer, but {type(self).__name__} needs {', '.join(self.state_names)}. Use a cache of this model, or "
                "none."
            )
        return states

    def is_readable(self, states: dict[str, torch.Tensor] | None) -> bool:
        return (self.config._attn_implementation == "eager" or torch.compiler.is_exporting()) and not states

    def result(self, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.output(output.to(dtype).transpose(1, 2))


class CumulativeSoftmaxMixer(_RecurrentMixer):
    """`non_approximate`: `silu(q_j) . k_j` is the score of token j for every query. A rotary embedding would turn both
    by the same angle, and is left out."""

    state_names = ("maximum", "sums")

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key = self.queries_and_keys(hidden_states, None)
        value = self.values(hidden_states).repeat_interleave(self.num_key_value_groups, dim=1)
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        scores = own_scores(nn.functional.silu(query), key, self.scaling)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None], LOWEST)
        states, weights = self.states_of(cache), None
        if self.is_readable(states):
            weights = cumulative_softmax_weights(scores)
            output = weights @ value.float()
            weights = weights.to(value.dtype)
        if cache is not None or weights is None:
            fast, after = cumulative_softmax(scores, value, states or None)
            output = output if weights is not None else fast
            if cache is not None:
                states.update(after)
        return self.result(output, hidden_states.dtype), weights


class TaylorMixer(_RecurrentMixer):
    """`taylor_joint` and `taylor_per_order`: polynomials in the place of the exponential."""

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.terms = TAYLOR_TERMS[config.layer_kinds[layer_idx]]
        self.state_names = tuple(f"sums_{order}" for order in range(len(self.terms)))

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key = (states.float() for states in self.queries_and_keys(hidden_states, position_embeddings))
        # (batch, kv_heads, groups, length, head_dim): the sums are those of the keys
        query = query.unflatten(1, (key.shape[1], -1)) * self.scaling
        key, value = key[:, :, None], self.values(hidden_states).float()[:, :, None]
        valid = None if attention_mask is None else attention_mask[:, None, None, :, None]
        states, weights = self.states_of(cache), None
        if self.is_readable(states):
            row_of_valid = None if valid is None else valid.transpose(-1, -2)
            weights = sum(taylor_weights(query, key, self.terms, row_of_valid)).flatten(1, 2)
            output = weights.unflatten(1, query.shape[1:3]) @ value
            weights = weights.to(hidden_states.dtype)
        if cache is not None or weights is None:
            fast, sums = taylor_attention(
                query,
                key,
                value,
                self.terms,
                valid,
                [states[name] for name in self.state_names] if states else None,
                keep_sums=cache is not None,
            )
            output = output if weights is not None else fast
            if cache is not None:
                states.update(zip(self.state_names, sums, strict=True))
        return self.result(output.flatten(1, 2), hidden_states.dtype), weights


class EmbeddingAttention(DecoderAttention):
    """`static_emb_qk`: queries and keys of the embeddings of the tokens, values of the hidden states."""

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        token_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args:
        token_states: embeddings of the tokens, normalised, `(batch, length, hidden_size)`.
        """
        query, key = self.queries_and_keys(token_states, position_embeddings)
        value = self.values(hidden_states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.output(output), weights


class StaticAttention(DecoderAttention):
    """`rnd_emb_qk` and `fixed_seq_qk`: the map of a constant sequence, values of the hidden states."""

    cache_kind = StaticMapLayer

    def static_map(self, static_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]):
        """The map of a constant sequence's hidden states `(1, length, hidden_size)`, normalised."""
        query, key = self.queries_and_keys(static_states, position_embeddings)
        return StaticMap(query[0], key[0], self.scaling)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        static_map: StaticMap,
        position_ids: torch.Tensor,
        key_positions: torch.Tensor | None = None,
        is_whole: bool = False,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args:
        static_map: the map that the layer has for all inputs.
        position_ids: of the tokens, `(batch or 1, length)`.
        key_positions: of all tokens so far; those of the slots of the cache, 0, 1, 2..., if not given.
        is_whole: whether the index of every token is its position, and it attends to all earlier tokens.
        """
        value = self.values(hidden_states)
        batch = value.shape[0]
        value = self.cached_values(value, cache)
        key_length = value.shape[2]
        if hidden_states.shape[1] == 1 and is_whole:
            # The same row for the whole batch. A static cache has empty slots behind it.
            row = static_map.row(int(position_ids[0, 0]))
            output = (row @ value[:, :, : row.shape[-1]]).flatten(1, 2)[:, None]
            weights = row.flatten(0, 1)[None, :, None].expand(batch, -1, -1, -1)
            return self.output(output), weights if self.config._attn_implementation == "eager" else None
        query, key = static_map.at(position_ids, key_positions, key_length)
        query, key = (states.expand(batch, -1, -1, -1) for states in (query, key))
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.output(output), weights


MIXERS = {
    "standard": DecoderAttention,
    "mlp": MLPMixer,
    "taylor_joint": TaylorMixer,
    "taylor_per_order": TaylorMixer,
    "non_approximate": CumulativeSoftmaxMixer,
    **dict.fromkeys(STATIC_KINDS, StaticAttention),
    "static_emb_qk": EmbeddingAttention,
}
