"""Permanent removal of heads: as zeros that are saved with the model, or cut out of the weights for speed."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .layout import ViTLayout


#: field of a configuration that lists the zeroed heads
_FIELD = "zeroed_heads"


@torch.no_grad()
def zero_heads(model: nn.Module, heads: Mapping[int, Sequence[int]]) -> None:
    """Remove heads permanently: set their columns of the output projection to zero, which is equivalent to pruning them.

    The shapes stay, so the model saves and loads as before, with its heads removed; `config.zeroed_heads` lists them.

    Args:
        model: a supported vision transformer.
        heads: layer -> heads to remove, besides those that were removed before.

    Raises:
        ValueError: for a layer or head that the model does not have, or a projection whose weight is not stored as a plain tensor.
    """
    layout = ViTLayout.of(model)
    layout.check_heads(heads)
    for layer in heads:
        _plain_linear(layout.projections[layer], "zeroed")
    for layer, removed in heads.items():
        weight = layout.projections[layer].weight
        weight.view(weight.shape[0], layout.num_heads, -1)[:, list(removed)] = 0
    if hasattr(model, "config"):
        known = zeroed_heads(model)
        for layer, removed in heads.items():
            known[layer] = sorted({*known.get(layer, ()), *removed})
        # Keys of JSON are strings.
        setattr(model.config, _FIELD, {str(layer): removed for layer, removed in sorted(known.items())})


def zeroed_heads(model: nn.Module) -> dict[int, list[int]]:
    """The heads that [`zero_heads`] has removed from a model, also before it was saved: layer -> heads."""
    saved = getattr(getattr(model, "config", None), _FIELD, None) or {}
    return {int(layer): list(heads) for layer, heads in saved.items()}


@torch.no_grad()
def cut_heads(model: nn.Module, heads: Mapping[int, Sequence[int]] | None = None) -> None:
    """Cut heads out of the weights, so that they cost no time: equal to pruning them.

    `from_pretrained` does not know the smaller shapes, so a model with heads cut out is not saved: save one with
    [`zero_heads`], and cut after loading it.

    Args:
        model: a supported vision transformer with separate projections of queries, keys and values, or of timm.
        heads: layer -> heads to cut; by default those that [`zero_heads`] has removed.

    Raises:
        ValueError: for a layer or head that the model does not have, a layer without a head left, or weights that cannot be cut.
    """
    layout = ViTLayout.of(model)
    heads = zeroed_heads(model) if heads is None else heads
    layout.check_heads(heads)
    for layer, removed in heads.items():
        attention, projection = layout.attentions[layer], layout.projections[layer]
        if len(set(removed)) == layout.num_heads:
            raise ValueError(f"Layer {layer} would have no head left: use zero_heads, which keeps the shapes.")
        for linear in (projection, *_inputs(attention).values()):
            _plain_linear(linear, "cut")
        if type(attention).__name__ == "BeitAttention":
            raise ValueError("BEiT's position bias has one entry per head: use zero_heads, which keeps the shapes.")
    for layer, removed in heads.items():
        attention, projection = layout.attentions[layer], layout.projections[layer]
        kept = [head for head in range(layout.num_heads) if head not in set(removed)]
        for name, linear in _inputs(attention).items():
            parts = 3 if name == "qkv" else 1
            _cut_rows(linear, layout.num_heads, kept, parts)
        _cut_columns(projection, layout.num_heads, kept)
        for name in ("num_attention_heads", "num_heads"):
            if hasattr(attention, name):
                setattr(attention, name, len(kept))
        if hasattr(attention, "attn_dim"):
            attention.attn_dim = projection.in_features

    def refuse(*args, **kwargs):
        raise ValueError(
            "Heads were cut out of this model, so from_pretrained could not load its weights. Save a model with "
            "zero_heads instead, and cut the heads after loading."
        )

    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse


def _inputs(attention: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "qkv") if hasattr(attention, name)
    }


def _plain_linear(linear: nn.Module, what: str) -> None:
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"Heads cannot be {what} in a {type(linear).__name__}, whose weight is computed: merge or fold it first, or use "
            "without_heads."
        )


def _cut_rows(linear: nn.Linear, num_heads: int, kept: list[int], parts: int) -> None:
    def rows(tensor: torch.Tensor) -> nn.Parameter:
        by_head = tensor.unflatten(0, (parts, num_heads, -1))[:, kept]
        return nn.Parameter(by_head.flatten(0, 2).clone(), requires_grad=tensor.requires_grad)

    linear.weight = rows(linear.weight)
    if linear.bias is not None:
        linear.bias = rows(linear.bias)
    linear.out_features = len(linear.weight)


def _cut_columns(linear: nn.Linear, num_heads: int, kept: list[int]) -> None:
    weight = linear.weight
    columns = weight.unflatten(1, (num_heads, -1))[:, kept].flatten(1)
    linear.weight = nn.Parameter(columns.clone(), requires_grad=weight.requires_grad)
    linear.in_features = columns.shape[1]
