"""Disentangled attention by the CUDA kernels of the packages `disentangled-flash` and `flashdeberta`.

Only the calls are written here. They follow the published signatures of disentangled-flash 1.1 and flashdeberta 0.0.8, and
were not run: they need an NVIDIA GPU.
"""

from importlib.util import find_spec

import torch


def is_installed(package: str) -> bool:
    """Whether a package (`disentangled_flash` or `flashdeberta`) can be imported."""
    return find_spec(package) is not None


def disentangled_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor | None,
    position_query: torch.Tensor | None,
    rows: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Self-attention by `disentangled_flash`; arguments as of ``blockwise_disentangled``, mask `(batch, 1, 1, length)`."""
    from disentangled_flash.position import gradient_band, pad_position_table
    from disentangled_flash.training.attention import training_attention

    batch, _, length, _ = query.shape
    has_padding = attention_mask is not None
    mask = attention_mask[:, 0, 0] if has_padding else query.new_ones(batch, length, dtype=torch.bool)
    return training_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        pad_position_table(position_key),
        pad_position_table(position_query),
        rows.to(torch.int32),
        mask.contiguous(),
        score_scale=scaling,
        has_padding=has_padding,
        strict_fp32=True,
        dropout_p=dropout,
        gradient_band=gradient_band(rows, query.device),
    )


def flashdeberta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor | None,
    position_query: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scaling: float,
    position_buckets: int,
    max_relative_positions: int,
) -> torch.Tensor:
    """Self-attention by `flashdeberta`, with the whole table of positions `(heads, 2 * span, head_dim)`; padding right only."""
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled

    lengths = None if attention_mask is None else attention_mask[:, 0, 0].sum(-1).to(torch.int32)
    return flash_attention_with_disentangled(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        lengths,
        None if position_key is None else position_key[None],
        None if position_query is None else position_query[None],
        causal=False,
        sm_scale=scaling,
        position_buckets=position_buckets,
        max_relative_distance=max_relative_positions,
    )
