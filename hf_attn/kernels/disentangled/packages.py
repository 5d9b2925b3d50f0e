"""Disentangled attention by the CUDA kernels of the packages `disentangled-flash` and `flashdeberta`.

Only the calls are written here. They follow the published signatures of disentangled-flash 1.1 and flashdeberta 0.0.8, and
were not run: they need an NVIDIA GPU.
"""

from importlib.util import find_spec

import torch

from ..call import Refusal
from .call import DisentangledCall


def is_installed(package: str) -> bool:
    """Whether a package (`disentangled_flash` or `flashdeberta`) can be imported."""
    return find_spec(package) is not None


def _refusal(call: DisentangledCall, package: str) -> Refusal | None:
    name = package.replace("_", "-")
    if not is_installed(package):
        return Refusal(f"the package {name} is not installed (`pip install 'hf_attn[deberta-cuda]'`)")
    if call.query.device.type != "cuda":
        return Refusal(f"{name} runs on CUDA, but the model is on {call.query.device.type}")
    if call.rows is None:
        return Refusal(f"{name} does not support positions per pair of tokens, nor compiled or exported graphs")
    if not call.has_positions:
        return Refusal("the model has no relative positions")
    if call.attention_mask is not None and call.attention_mask.shape[2] != 1:
        return Refusal(f"{name} supports masks of keys, not of token pairs")
    return None


def check_disentangled_flash(call: DisentangledCall) -> Refusal | None:
    if call.query.shape[-1] not in (32, 64, 128):
        return Refusal(f"disentangled-flash supports head dimensions 32, 64 and 128, not {call.query.shape[-1]}")
    return _refusal(call, "disentangled_flash")


def disentangled_flash(call: DisentangledCall, found: None = None) -> tuple[torch.Tensor, None]:
    """Self-attention by `disentangled_flash`."""
    from disentangled_flash.position import gradient_band, pad_position_table
    from disentangled_flash.training.attention import training_attention

    batch, _, length, _ = call.query.shape
    has_padding = call.attention_mask is not None
    mask = call.attention_mask[:, 0, 0] if has_padding else call.query.new_ones(batch, length, dtype=torch.bool)
    output = training_attention(
        call.query.contiguous(),
        call.key.contiguous(),
        call.value.contiguous(),
        pad_position_table(call.position_key),
        pad_position_table(call.position_query),
        call.rows.to(torch.int32),
        mask.contiguous(),
        score_scale=call.scaling,
        has_padding=has_padding,
        strict_fp32=True,
        dropout_p=call.dropout,
        gradient_band=gradient_band(call.rows, call.query.device),
    )
    return output, None


def check_flashdeberta(call: DisentangledCall) -> Refusal | None:
    if (refusal := _refusal(call, "flashdeberta")) is not None:
        return refusal
    if call.dropout:
        return Refusal("flashdeberta does not support dropout")
    if call.buckets > 0 and not call.hf_compat and call.query.shape[2] > call.max_distance:
        return Refusal(
            f"flashdeberta treats distances beyond {call.max_distance - 1} like transformers; set hf_compat=True to "
            "accept this"
        )
    mask = call.attention_mask
    if mask is not None and not (mask[..., 1:] <= mask[..., :-1]).all():
        return Refusal("flashdeberta supports right padding only")
    return None


def flashdeberta(call: DisentangledCall, found: None = None) -> tuple[torch.Tensor, None]:
    """Self-attention by `flashdeberta`, with the whole table of positions `(heads, 2 * span, head_dim)`."""
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled

    mask = call.attention_mask
    output = flash_attention_with_disentangled(
        call.query.contiguous(),
        call.key.contiguous(),
        call.value.contiguous(),
        None if mask is None else mask[:, 0, 0].sum(-1).to(torch.int32),
        *(None if table is None else table[None] for table in call.positions),
        causal=False,
        sm_scale=call.scaling,
        position_buckets=call.buckets,
        max_relative_distance=call.max_distance,
    )
    return output, None
