"""Mixers whose operator is a softmax over scores of pairs: all pairs, a window, distances."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from .base import ProjectedMixer, TokenMixer


#: queries that `window` handles at once; the scores of a block are `(block, block + 2 * window)`
_BLOCK = 64


def _attend(query, key, value, causal: bool, start: int, scale: float | None = None) -> torch.Tensor:
    """Attention of the rows from `start` on, streamed by SDPA."""
    query, key, value = (states.unsqueeze(1) for states in (query, key, value))
    mask = None
    if causal and start > 0 and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril(start)
    is_causal = True if causal and start == 0 else False  # noqa: SIM210 (a symbolic number under torch.compile)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale).squeeze(1)


class SoftmaxMixer(ProjectedMixer):
    """Attention: `M = softmax(Q K^T / sqrt d)`."""

    name = "softmax"

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        seen = self.visible(hidden_states.shape[1], hidden_states.device)
        return self.scores(hidden_states).masked_fill(~seen, -torch.inf).softmax(-1)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        query, key = self.q_proj(hidden_states[:, start:]), self.k_proj(hidden_states)
        return _attend(query, key, self.values(hidden_states), self.causal, start)


class WindowMixer(ProjectedMixer):
    """Attention to the tokens at a distance of at most `window`."""

    name = "window"

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        seen = self.visible(hidden_states.shape[1], hidden_states.device, self.window)
        return self.scores(hidden_states).masked_fill(~seen, -torch.inf).softmax(-1)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        skipped = max(0, start - self.window)
        hidden_states, start = hidden_states[:, skipped:], start - skipped
        length, device = hidden_states.shape[1], hidden_states.device
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        value = self.values(hidden_states)
        before = min(self.window, length - 1)
        after = 0 if self.causal else before
        block = min(max(_BLOCK, before), length)
        blocks = -(-length // block)
        surplus = blocks * block - length

        def neighbourhoods(states: torch.Tensor) -> torch.Tensor:
            states = nn.functional.pad(states, (0, 0, before, after + surplus))
            return states.unfold(1, block + before + after, block).mT

        rows = torch.arange(block, device=device)[:, None]
        columns = torch.arange(block + before + after, device=device) - before
        near = (columns - rows >= -before) & (columns - rows <= after)
        position = torch.arange(blocks, device=device)[:, None] * block + columns
        exists = (position >= 0) & (position < length)
        # A query that only fills the last block attends to itself, so that no row of the softmax is empty.
        seen = near & (exists[:, None] | (columns == rows))
        query = nn.functional.pad(query, (0, 0, 0, surplus)).unflatten(1, (blocks, block))
        mixed = scaled_dot_product_attention(query, neighbourhoods(key), neighbourhoods(value), attn_mask=seen)
        return mixed.flatten(1, 2)[:, start:length]


class GramSmootherMixer(TokenMixer):
    """Gaussian smoothing: `M_ij` is `exp(-|x_i - x_j|^2 / 2)`, with rows that sum to 1, and `V = X`."""

    name = "gram_smoother"

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        distances = (hidden_states[:, :, None] - hidden_states[:, None]).square().sum(-1)
        seen = self.visible(hidden_states.shape[1], hidden_states.device)
        return (-distances / 2).masked_fill(~seen, -torch.inf).softmax(-1)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        # |x_i|^2 / 2 is the same in a whole row: the scores are x_i . x_j - |x_j|^2 / 2.
        half_norms = hidden_states.square().sum(-1, keepdim=True) / -2
        key = torch.cat([hidden_states, half_norms], -1)
        query = nn.functional.pad(hidden_states[:, start:], (0, 1), value=1.0)
        # SDPA streams only what has one width.
        value = nn.functional.pad(hidden_states, (0, 1))
        return _attend(query, key, value, self.causal, start, scale=1.0)[..., :-1]
