# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Object attention, the output head of OAT."""

import torch
from torch import nn

from .configuration_oat import OATConfig


class OATPointerHead(nn.Module):
    """Object attention, the output head: scores of the encoder's tokens, and a constant one of PAD.

    S_h = concat(Q_h E_h^T, 0) / sqrt(d), scores = sum_h w_h S_h + b; without w and b if there is one head. The last token of
    the encoder, the target, stands for EOS.
    """

    def __init__(self, config: OATConfig):
        super().__init__()
        self.num_heads = config.num_pointer_heads
        self.scaling = (config.pointer_scaling_dim or config.hidden_size) ** -0.5
        self.query_proj = nn.Linear(config.hidden_size, self.num_heads * config.hidden_size)
        self.key_proj = nn.Linear(config.hidden_size, self.num_heads * config.hidden_size)
        self.readout = nn.Linear(self.num_heads, 1) if self.num_heads > 1 else None

    def _keys(self, scenes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Keys of all heads, weighted, `(batch, objects + 1, heads * hidden_size)`, and the constant of the sum over heads."""
        keys = self.key_proj(scenes) * self.scaling
        if self.readout is None:
            return keys, 0.0
        # The weighted sum over heads is one product over the channels of all heads.
        return keys * self.readout.weight.squeeze(0).repeat_interleave(scenes.shape[-1]), self.readout.bias

    def fold(self, scenes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scores of encoded scenes as one linear map of the decoder's states, for decoding step by step.

        Returns:
            Its weight `(batch, objects + 1, hidden_size)` and bias `(batch, 1, objects + 1)`; `None` if the query projection is
            no plain layer, such as one with an adapter, which works through its call.
        """
        if type(self.query_proj) is not nn.Linear or hasattr(self.query_proj, "_hf_hook"):
            return None
        keys, bias = self._keys(scenes)
        return keys @ self.query_proj.weight, (keys @ self.query_proj.bias).unsqueeze(1) + bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        scenes: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        folded: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Score.

        Args:
            hidden_states: `(batch * scanpaths, length, hidden_size)`, of the decoder.
            scenes: `(batch, objects + 1, hidden_size)`, of the encoder.
            token_mask: `(batch, objects + 1)`; scores are minus infinity where it is false.
            folded: the result of `fold` for these scenes.

        Returns:
            `(batch * scanpaths, length, objects + 2)`.
        """
        if folded is not None:
            weight, bias = folded
            states = hidden_states.reshape(scenes.shape[0], -1, hidden_states.shape[-1])
            scores = torch.baddbmm(bias, states, weight.transpose(1, 2))
            constant = 0.0 if self.readout is None else self.readout.bias
        else:
            queries = self.query_proj(hidden_states).reshape(scenes.shape[0], -1, self.query_proj.out_features)
            keys, constant = self._keys(scenes)
            scores = queries @ keys.transpose(1, 2) + constant
        pad_scores = (scores.new_zeros(1, 1, 1) + constant).expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, pad_scores], dim=-1)
        if token_mask is not None:
            token_mask = nn.functional.pad(token_mask, (0, 1), value=True)
            scores = scores.masked_fill(~token_mask.unsqueeze(1), -torch.inf)
        return scores.view(*hidden_states.shape[:-1], -1)
