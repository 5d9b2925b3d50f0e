"""The attention types of the family as mixers of its layers."""

import torch
from torch import nn

from hf_attn.architectures.decoder import DecoderAttention

from .configuration_wide_attention import WideTransformerConfig
from .functions import (
    linear_attention,
    linformer_projection,
    performer_attention,
    sinkhorn_blocks,
    sinkhorn_permutation,
)


class WideAttention(DecoderAttention):
    """Softmax attention, over all keys or those of a pattern (`"local"`, `"sparse"`, `"longformer"`, `"bigbird"`)."""


class GlobalAttention(WideAttention):
    """Longformer with global tokens, the first ones, which have projections of their own (arXiv 2004.05150)."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_global_tokens = config.attention_kwargs["num_global_tokens"]
        size = config.num_attention_heads * self.head_dim
        self.q_proj_global = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
        self.k_proj_global = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
        self.v_proj_global = nn.Linear(config.hidden_size, size, bias=config.attention_bias)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        """See [`~hf_attn.architectures.decoder.DecoderAttention.forward`]."""
        query, key = self.queries_and_keys(hidden_states, position_embeddings)
        output, weights = self.attend(query, key, self.values(hidden_states), attention_mask, **kwargs)
        count = min(self.num_global_tokens, hidden_states.shape[1])
        rows = attention_mask if attention_mask is None else attention_mask[:, :, :count]
        query = self.heads(self.q_proj_global, hidden_states[:, :count])
        key, value = (self.heads(layer, hidden_states) for layer in (self.k_proj_global, self.v_proj_global))
        global_output, global_weights = self.attend(query, key, value, rows, **kwargs)
        output = torch.cat([global_output, output[:, count:]], dim=1)
        if weights is not None and global_weights is not None:
            weights = torch.cat([global_weights, weights[:, :, count:]], dim=2)
        return self.output(output), weights


class SynthesizerAttention(WideAttention):
    """Weights that depend only on the positions, `softmax(R1 R2^T)` in each head (arXiv 2005.00743)."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx, has_queries_and_keys=False)
        shape = (config.num_attention_heads, config.max_position_embeddings + 1, config.attention_kwargs["rank"])
        self.left_factor = nn.Parameter(torch.empty(shape))
        self.right_factor = nn.Parameter(torch.empty(shape))
        self.scaling = 1.0

    def queries_and_keys(self, hidden_states, position_embeddings):
        batch, length = hidden_states.shape[:2]
        rows = (self.left_factor, self.right_factor)
        return tuple(table[:, :length].to(hidden_states.dtype).expand(batch, -1, -1, -1) for table in rows)


class _PaddingMaskedAttention(WideAttention):
    """Attention with a padding mask that has no weights of single keys to return."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mask_kind = "padding"

    def attend(self, query_states, key_states, value_states, attention_mask, **kwargs):
        output = self.mix(query_states, key_states, value_states, attention_mask[:, None, :, None])
        return output.transpose(1, 2), None

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Output `(batch, heads, length, head_dim)`; see [`.functions`] for the arguments."""
        raise NotImplementedError

    def softmax_attention(self, query, key, value, mask=None) -> torch.Tensor:
        """Softmax attention over keys that have been made, with the dropout of the model."""
        dropout = self.attention_dropout if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scaling)


class LinearAttention(_PaddingMaskedAttention):
    """Linear attention."""

    def mix(self, query, key, value, mask):
        return linear_attention(query, key, value, mask)


class LinformerAttention(_PaddingMaskedAttention):
    """Linformer, with one projection for keys and values of all heads."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        length = config.max_position_embeddings + 1
        self.token_projection = nn.Parameter(torch.empty(length, config.attention_kwargs["rank"]))

    def mix(self, query, key, value, mask):
        key, value = (linformer_projection(states, self.token_projection, mask) for states in (key, value))
        return self.softmax_attention(query, key, value)


class PerformerAttention(_PaddingMaskedAttention):
    """Performer. The random directions are saved with the model, but are not parameters."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kernel = config.attention_kwargs["kernel"]
        self.register_buffer("directions", torch.empty(config.attention_kwargs["num_features"], self.head_dim))

    def mix(self, query, key, value, mask):
        return performer_attention(query, key, value, mask, self.directions, self.kernel)


class SinkhornAttention(_PaddingMaskedAttention):
    """Blocks that attend to themselves and to a learned mixture of blocks."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.block_size = config.attention_kwargs["block_size"]
        self.max_blocks = config.attention_kwargs["max_blocks"]
        self.block_scores = nn.Linear(self.head_dim, self.max_blocks)

    def mix(self, query, key, value, mask):
        length = query.shape[-2]
        # Not -(-length // block_size): ONNX divides towards zero.
        blocks = (length + self.block_size - 1) // self.block_size
        if blocks > self.max_blocks:
            raise ValueError(
                f"{length} tokens are {blocks} blocks of {self.block_size}, but attention_kwargs['max_blocks'] is "
                f"{self.max_blocks}."
            )
        rest = blocks * self.block_size - length
        query, key, value, mask = (
            nn.functional.pad(states, (0, 0, 0, rest)).unflatten(2, (blocks, self.block_size))
            for states in (query, key, value, mask)
        )
        permutation = sinkhorn_permutation(key, mask, self.block_scores)
        key, value, mask = sinkhorn_blocks(key, value, mask, permutation)
        heads = query.shape[1]
        mask = mask.transpose(-2, -1).expand(-1, heads, -1, -1, -1)
        # Blocks in the place of heads: ONNX has attention for four dimensions only.
        flat = (states.flatten(0, 1) for states in (query, key, value, mask))
        output = self.softmax_attention(*flat).unflatten(0, query.shape[:2])
        return output.flatten(2, 3)[:, :, :length]


_MIXERS = {
    "linear": LinearAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
    "sinkhorn": SinkhornAttention,
    "synthesizer": SynthesizerAttention,
}


def make_mixer(config: WideTransformerConfig, layer_idx: int) -> WideAttention:
    """The mixer of a layer."""
    if config.attention_type == "longformer" and config.attention_kwargs["num_global_tokens"]:
        return GlobalAttention(config, layer_idx)
    return _MIXERS.get(config.attention_type, WideAttention)(config, layer_idx)
