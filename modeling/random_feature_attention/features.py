"""Feature maps, which are multiplied by the trained values of a model. Both models are linear in their values."""

import torch
from torch import nn


#: samples that are handled at once; their scores are the largest temporary, `(block, heads, keys)`
BLOCK = 32


def append_one(tokens: torch.Tensor) -> torch.Tensor:
    """`x~ = [x; 1]`."""
    return nn.functional.pad(tokens, (0, 1), value=1.0)


def attention_features_eager(inputs_embeds: torch.Tensor, qk_weight: torch.Tensor) -> torch.Tensor:
    """[`attention_features`] computed directly from the equation, head by head."""
    query, keys = append_one(inputs_embeds[:, 0]), append_one(inputs_embeds[:, 1:])
    features = []
    for head in qk_weight:
        scores = torch.einsum("ba,ac,bnc->bn", query, head, keys)
        features.append((scores.relu()[:, :, None] * keys).mean(1))
    return torch.cat(features, 1)


def attention_features(inputs_embeds: torch.Tensor, qk_weight: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """`phi(x)_m = mean over keys of relu(x~_0^T W_m x~_i) x~_i`.

    Args:
        inputs_embeds: `(batch, 1 + keys, d)`, the query first.
        qk_weight: `(heads, d + 1, d + 1)`, query coordinate before key coordinate.
        block: samples that are handled at once.

    Returns:
        `(batch, heads * (d + 1))`, head by head.
    """
    heads, width = qk_weight.shape[:2]
    weight = qk_weight.permute(1, 0, 2).reshape(width, -1)
    tokens = append_one(inputs_embeds)
    if torch.is_grad_enabled() and (inputs_embeds.requires_grad or qk_weight.requires_grad):
        # At least one block, which may be empty.
        return torch.cat([_block_features(samples, weight) for samples in tokens.split(block)]).flatten(1)
    features = tokens.new_empty(len(tokens), heads, width)
    for start in range(0, len(tokens), block):
        _block_features(tokens[start : start + block], weight, out=features[start : start + block])
    return features.flatten(1)


def _block_features(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Features `(block, heads, d + 1)`; `weight` is `(d + 1, heads * (d + 1))`."""
    query, keys = tokens[:, 0], tokens[:, 1:]
    directions = (query @ weight).unflatten(1, (-1, tokens.shape[2]))
    scores = torch.bmm(directions, keys.mT).relu_()
    return torch.bmm(scores, keys / keys.shape[1], out=out)


def mlp_features(inputs_embeds: torch.Tensor, mlp_weight: torch.Tensor) -> torch.Tensor:
    """`relu(<w_j, [x_0; ...; x_N; 1]>)`.

    Args:
        inputs_embeds: `(batch, 1 + keys, d)`.
        mlp_weight: `(units, (1 + keys) * d + 1)`.

    Returns:
        `(batch, units)`.
    """
    return nn.functional.linear(inputs_embeds.flatten(1), mlp_weight[:, :-1], mlp_weight[:, -1]).relu()
