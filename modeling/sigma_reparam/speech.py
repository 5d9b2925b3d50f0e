# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The transformer block of the paper's speech models (arXiv 2303.06296)."""

import torch
from torch import nn

from hf_attn.analysis.entropy import attention_entropy
from hf_attn.patching.sigma_reparam import SigmaReparamLinear


#: grouping of the projections of the attention input -> names of the layers and the projections that each computes
PROJECTION_GROUPS = {0: ("qkv",), 1: ("qk", "v"), 2: ("q", "k", "v")}


class SigmaReparamSpeechBlock(nn.Module):
    """Self-attention and feed-forward with sigma-reparametrised maps.

    Args:
        hidden_size: width of the tokens.
        intermediate_size: width inside the feed-forward block.
        num_attention_heads: number of heads.
        norm: `"none"`, `"pre"` or `"post"`: position of LayerNorm.
        reparametrised: whether the maps are reparametrised.
        projection_groups: 0: queries, keys and values as one matrix; 1: queries and keys as one, values apart (the
            paper's choice for speech); 2: three matrices. Each matrix has one gamma.
        use_bias: biases in the maps.
        dropout: dropout of attention weights and feed-forward activations.
        layer_dropout: probability that the block is skipped, drawn once for both branches.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        norm: str = "none",
        reparametrised: bool = True,
        projection_groups: int = 1,
        use_bias: bool = False,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
    ):
        super().__init__()
        if norm not in ("none", "pre", "post"):
            raise ValueError(f"norm must be 'none', 'pre' or 'post', got {norm!r}.")
        if projection_groups not in PROJECTION_GROUPS:
            raise ValueError(f"projection_groups must be 0, 1 or 2, got {projection_groups!r}.")
        if hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_attention_heads})."
            )

        def linear(in_features: int, out_features: int) -> nn.Linear:
            if reparametrised:
                return SigmaReparamLinear(in_features, out_features, bias=use_bias, track_left=True)
            return nn.Linear(in_features, out_features, bias=use_bias)

        self.norm = norm
        self.head_dim = hidden_size // num_attention_heads
        self.dropout = dropout
        self.layer_dropout = layer_dropout
        self.attention_shift = nn.Parameter(torch.zeros(1))
        self.projections = nn.ModuleDict(
            {name: linear(hidden_size, len(name) * hidden_size) for name in PROJECTION_GROUPS[projection_groups]}
        )
        self.o_proj = linear(hidden_size, hidden_size)
        self.fc1 = linear(hidden_size, intermediate_size)
        self.fc2 = linear(intermediate_size, hidden_size)
        has_norm = norm != "none"
        self.attention_norm = nn.LayerNorm(hidden_size) if has_norm else nn.Identity()
        self.mlp_norm = nn.LayerNorm(hidden_size) if has_norm else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: `(batch, sequence, hidden_size)`.
            lengths: `(batch,)`, number of valid tokens of each row; later keys are masked, later queries are not.

        Returns:
            Output of the shape of `hidden_states`, and the mean entropy of the attention, a scalar in nats.
        """
        keep = 1.0
        if self.training and self.layer_dropout > 0:
            keep = (torch.rand((), device=hidden_states.device) >= self.layer_dropout).to(hidden_states.dtype)
        pre, post = self.norm == "pre", self.norm == "post"

        attended, entropy = self._attend(self.attention_norm(hidden_states) if pre else hidden_states, lengths)
        hidden_states = hidden_states + keep * attended
        hidden_states = self.attention_norm(hidden_states) if post else hidden_states

        transformed = self._feed_forward(self.mlp_norm(hidden_states) if pre else hidden_states)
        hidden_states = hidden_states + keep * transformed
        return self.mlp_norm(hidden_states) if post else hidden_states, entropy

    def _attend(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states + self.attention_shift
        projected = torch.cat([projection(hidden_states) for projection in self.projections.values()], dim=-1)
        query, key, value = projected.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        visible = torch.arange(key.shape[2], device=lengths.device) < lengths[:, None]
        scores = scores.masked_fill(~visible[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        entropy = attention_entropy(weights.detach(), eps=1e-6).mean()
        output = nn.functional.dropout(weights, self.dropout, self.training) @ value
        return self.o_proj(output.transpose(1, 2).flatten(-2)), entropy

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activations = nn.functional.relu(self.fc1(hidden_states))
        return self.fc2(nn.functional.dropout(activations, self.dropout, self.training))


__all__ = ["SigmaReparamSpeechBlock"]
