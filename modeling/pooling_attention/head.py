"""The trainable head of designs 2 to 5: latents that read the hidden states by cross-attention, then a feed-forward block.

For latents Z (r, d) and vectors X (n, d), to which the multi-layer head adds a learned row for each layer:

    Y = Attention(q=LN(Z), k,v=LN(X)) Wo + Z,    Y <- Y + FF(LN(Y)),    e = mean over the r latents

The fast form is exact. It computes the queries once for the batch. With few keys it computes no queries at all: the scores are
LN(Z) (Wq^T k), and the weighted sum is taken of Wo v, both linear in each head. One key has the attention weight 1, and its
value is the result. The mean over the latents is taken before the last linear map of the feed-forward block.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


#: a head that starts as a mean multiplies the standard deviation of its latents by it
_SMALL = 0.02


class LatentAttention(nn.Module):
    """Cross-attention of the latents to the hidden states, without biases."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.states_norm = nn.LayerNorm(hidden_size)
        self.latents_norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, inner, bias=False)
        self.key = nn.Linear(hidden_size, inner, bias=False)
        self.value = nn.Linear(hidden_size, inner, bias=False)
        self.dense = nn.Linear(inner, hidden_size, bias=False)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)

    def eager_forward(
        self, latents: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The specification; arguments and result are those of `forward`."""
        states = self.states_norm(states)
        query = self._heads(self.query(self.latents_norm(latents)))
        key, value = self._heads(self.key(states)), self._heads(self.value(states))
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        return self.dense((weights @ value).transpose(1, 2).flatten(2))

    def forward(self, latents: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend.

        Args:
            latents: `(r, hidden_size)`.
            states: `(batch, n, hidden_size)`.
            mask: boolean `(batch, n)`, false for vectors that are not there.

        Returns:
            `(batch, r, hidden_size)`, or `(batch, 1, hidden_size)`, the same for all latents, if n is 1.
        """
        states = self.states_norm(states)
        if states.shape[1] == 1:
            # With a single key the softmax is 1, because every text has a token.
            attended = self.dense(self.value(states))
            return attended + self._zero() if torch.is_grad_enabled() else attended
        latents = self.latents_norm(latents)
        key, value = self._heads(self.key(states)), self._heads(self.value(states))
        mask = None if mask is None else mask[:, None, None]
        if self._folds(len(latents), states.shape[1]):
            return self._folded(latents, key, value, mask)
        query = self._heads(self.query(latents)).expand(len(states), -1, -1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(attended.transpose(1, 2).flatten(2))

    def _folds(self, num_latents: int, num_keys: int) -> bool:
        # Multiplications per channel and text: keys * (inner + r * heads) twice, against r * inner twice.
        is_cheaper = num_keys * (self.head_dim + num_latents) < num_latents * self.head_dim
        # Adapters, quantisers and offloading work through the call of a layer.
        return is_cheaper and all(
            type(layer) is nn.Linear and not hasattr(layer, "_hf_hook") for layer in (self.query, self.dense)
        )

    def _folded(
        self, latents: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention whose keys and values, `(batch, heads, n, head_dim)`, take over the maps of queries and output."""
        by_head = (self.num_heads, self.head_dim)
        key = key @ self.query.weight.unflatten(0, by_head)
        value = value @ self.dense.weight.t().unflatten(0, by_head)
        scores = latents @ key.transpose(-1, -2) * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        # One product over heads and keys.
        return weights.transpose(1, 2).flatten(2) @ value.flatten(1, 2)

    def _zero(self) -> torch.Tensor:
        # With one key the gradients of unused parameters are zero, not None, which distributed training would not accept.
        unused = (self.query.weight, self.key.weight, self.latents_norm.weight, self.latents_norm.bias)
        return sum(parameter.flatten()[0] * 0 for parameter in unused)


class GatedFeedForward(nn.Module):
    """`out(u * gelu(g))` with `u, g = in(LN(x))`, four times as wide as its input."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.expand = nn.Linear(hidden_size, 8 * hidden_size)
        self.contract = nn.Linear(4 * hidden_size, hidden_size)

    def gated(self, states: torch.Tensor) -> torch.Tensor:
        """The activations before the last linear map."""
        value, gate = self.expand(self.norm(states)).chunk(2, dim=-1)
        return value * F.gelu(gate)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.contract(self.gated(states))


class PoolingHead(nn.Module):
    """The head of designs 2 to 5.

    Args:
        hidden_size: width d of the vectors and latents.
        num_latents: number r of latents.
        num_heads: number of attention heads.
        head_dim: width of a head.
        num_layers: rows of the layer table of the multi-layer head; 0 for the last-layer head, which has none.
    """

    def __init__(self, hidden_size: int, num_latents: int, num_heads: int, head_dim: int, num_layers: int = 0):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size))
        self.layer_embeddings = nn.Parameter(torch.randn(num_layers, hidden_size)) if num_layers else None
        self.attention = LatentAttention(hidden_size, num_heads, head_dim)
        self.feed_forward = GatedFeedForward(hidden_size)

    def reset_parameters(self, std: float = 1.0, start: str = "random") -> None:
        """Initialise parameters that are not loaded.

        Args:
            std: standard deviation of latents and table rows.
            start: `"random"` for torch's defaults of linear layers; `"mean"` for a head whose output is nearly the mean of the
                normalised vectors: values are copies of their channels and the output undoes it, as far as there are
                enough channels, the feed-forward block adds nothing, and latents and table rows are small.
        """
        for parameter in (self.latents, self.layer_embeddings):
            if parameter is not None:
                init.normal_(parameter, std=std if start == "random" else _SMALL * std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        if start == "mean":
            value = self.attention.value.weight
            inner, hidden_size = value.shape
            if inner < hidden_size:
                init.orthogonal_(value)
            else:
                channels = torch.arange(inner, device=value.device) % hidden_size
                init.copy_(value, nn.functional.one_hot(channels, hidden_size))
            # Columns of repeated channels are summed.
            init.copy_(self.attention.dense.weight, value.t() / value.square().sum(dim=0).clamp(min=1)[:, None])
            init.zeros_(self.feed_forward.contract.weight)
            init.zeros_(self.feed_forward.contract.bias)

    def _add_layer_embeddings(self, states: torch.Tensor) -> torch.Tensor:
        if self.layer_embeddings is None:
            return states
        count = states.shape[1]
        if count > len(self.layer_embeddings):
            raise ValueError(f"The head has embeddings for {len(self.layer_embeddings)} layers and was given {count}.")
        return states + self.layer_embeddings[:count]

    def eager_forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The specification; arguments and result are those of `forward`."""
        states = self._add_layer_embeddings(states)
        pooled = self.attention.eager_forward(self.latents, states, mask) + self.latents
        pooled = pooled + self.feed_forward(pooled)
        return pooled.mean(dim=1)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None, eager: bool = False) -> torch.Tensor:
        """Pool vectors to one, which is not normalised.

        Args:
            states: `(batch, n, hidden_size)`.
            mask: boolean `(batch, n)`, false for vectors that are not there.
            eager: compute what `eager_forward` does. Offloading and adapters work through this call.

        Returns:
            `(batch, hidden_size)`.
        """
        if eager:
            return self.eager_forward(states, mask)
        states = self._add_layer_embeddings(states)
        pooled = self.attention(self.latents, states, mask) + self.latents
        gated = self.feed_forward.gated(pooled).mean(dim=1)
        return pooled.mean(dim=1) + self.feed_forward.contract(gated)
