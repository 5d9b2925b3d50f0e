"""Removing heads, or parts of their attention, for a while: by hooks that are always taken off again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from ..recording import attention_implementation
from .hops import Grid
from .layout import UnknownLayoutError, ViTLayout, WeightsHook


#: parts of a head's attention, beside `ring_<hop>[_<hop>...]`
PARTIAL_KINDS = ("cls_to_patch", "patch_to_cls", "cls_to_cls", "patch_to_patch", "head")

_TAPPED = "hf_attn_tapped"
_PREFIX = "hf_attn_prefix"


def gate(heads: torch.Tensor, num_heads: int, removed: Sequence[int]) -> torch.Tensor:
    """The outputs of heads `(..., num_heads * head_dim)` with those of some heads zeroed."""
    keep = heads.new_ones(num_heads, 1)
    keep[list(removed)] = 0
    return (heads.unflatten(-1, (num_heads, -1)) * keep).flatten(-2)


@contextmanager
def without_heads(model: nn.Module | ViTLayout, heads: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Remove heads within a `with` block: their output is zero before the output projection, whose bias stays.

    It works with every `attn_implementation`, because the hooks are on the projections.

    Args:
        model: a supported vision transformer.
        heads: layer -> heads to remove.

    Raises:
        ValueError: for a layer or head that the model does not have.
    """
    layout = model if isinstance(model, ViTLayout) else ViTLayout.of(model)
    layout.check_heads(heads)
    with ExitStack() as hooks:
        for layer, removed in heads.items():

            def pre_hook(module, args, removed=tuple(removed)):
                return (gate(args[0], layout.num_heads, removed), *args[1:])

            hooks.callback(layout.projections[layer].register_forward_pre_hook(pre_hook).remove)
        yield


def _tapped_attention(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Soft-max attention whose weights go through the hook of the module before the values are averaged."""
    kwargs.pop("dropout", None)
    output, weights = eager_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    tap: WeightsHook | None = getattr(module, "_hf_attn_tap", None)
    changed = None if tap is None else tap(weights)
    if changed is not None:
        output = torch.matmul(changed, value).transpose(1, 2).contiguous()
    return output, weights if changed is None else changed


@contextmanager
def tapped(layout: ViTLayout, taps: Mapping[int, WeightsHook]) -> Iterator[None]:
    """Show the attention weights of layers to functions, which may change them.

    Raises:
        UnknownLayoutError: if the model computes its attention in some other way.
    """
    called = set()

    def count(layer: int, tap: WeightsHook) -> WeightsHook:
        def counting(weights: torch.Tensor) -> torch.Tensor | None:
            called.add(layer)
            return tap(weights)

        return counting

    counting = {layer: count(layer, tap) for layer, tap in taps.items()}
    with _timm_taps(layout, counting) if layout.is_timm else _transformers_taps(layout, counting):
        yield
    if called != set(taps):
        raise UnknownLayoutError(f"{type(layout.model).__name__} does not give access to its attention weights.")


@contextmanager
def _transformers_taps(layout: ViTLayout, taps: Mapping[int, WeightsHook]) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(_TAPPED, _tapped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_TAPPED, eager_mask)
    # The tower, not what is around it: a configuration of a text tower that is not there would be warned of at every call.
    towers = [module for module in layout.model.modules() if isinstance(module, PreTrainedModel)]
    tower = next(tower for tower in reversed(towers) if any(layout.layers[0] is module for module in tower.modules()))
    with attention_implementation(tower, _TAPPED):
        try:
            for layer, tap in taps.items():
                layout.attentions[layer]._hf_attn_tap = tap
            yield
        finally:
            for layer in taps:
                layout.attentions[layer].__dict__.pop("_hf_attn_tap", None)


def _prefix_attention(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Soft-max attention of the prefix tokens only; the rows of the other tokens are zero."""
    prefix = module._hf_attn_prefix
    mask = None if attention_mask is None else attention_mask[..., :prefix, :]
    output = nn.functional.scaled_dot_product_attention(query[:, :, :prefix], key, value, mask, scale=scaling)
    padded = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    padded[:, :prefix] = output.transpose(1, 2)
    return padded, None


@contextmanager
def prefix_queries(layout: ViTLayout, layer: int, prefix: int) -> Iterator[None]:
    """Let only the prefix tokens of a layer attend to others, if the attention of the layer can be replaced."""
    attention = layout.attentions[layer]
    config = getattr(attention, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    # The masks of other implementations have other forms.
    if implementation not in ("eager", "sdpa"):
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX, _prefix_attention)
    attention._hf_attn_prefix = prefix
    config._attn_implementation = _PREFIX
    try:
        yield
    finally:
        config._attn_implementation = implementation
        del attention._hf_attn_prefix


@contextmanager
def _timm_taps(layout: ViTLayout, taps: Mapping[int, WeightsHook]) -> Iterator[None]:
    fused = [attention.fused_attn for attention in layout.attentions]
    training = layout.model.training
    layout.model.eval()
    with ExitStack() as hooks:
        try:
            for layer, tap in taps.items():
                attention = layout.attentions[layer]
                attention.fused_attn = False
                hook = attention.attn_drop.register_forward_hook(lambda module, args, output, tap=tap: tap(output))
                hooks.callback(hook.remove)
            yield
        finally:
            layout.model.train(training)
            for attention, was_fused in zip(layout.attentions, fused, strict=True):
                attention.fused_attn = was_fused


def partial_mask(kind: str, grid: Grid, device=None) -> torch.Tensor:
    """The 0/1 mask `(tokens, tokens)` that removes a part of a head's attention.

    Args:
        kind: `"cls_to_patch"` (what the prefix tokens read from the patches), `"patch_to_cls"`, `"cls_to_cls"`, `"patch_to_patch"`,
            `"head"` (all), or `"ring_1_2"` (pairs of patches at hops 1 and 2).

    Raises:
        ValueError: for an unknown kind or a hop that the grid does not have.
    """
    prefix = grid.num_prefix_tokens
    mask = torch.ones(grid.num_tokens, grid.num_tokens, device=device)
    first, rest = slice(None, prefix), slice(prefix, None)
    parts = {
        "cls_to_patch": (first, rest),
        "patch_to_cls": (rest, first),
        "cls_to_cls": (first, first),
        "patch_to_patch": (rest, rest),
        "head": (slice(None), slice(None)),
    }
    if kind in parts:
        mask[parts[kind]] = 0
        return mask
    name, *hops = kind.split("_")
    if name != "ring" or not hops or not all(hop.isdigit() for hop in hops):
        raise ValueError(
            f"There is no part of attention called {kind!r}. Available: {', '.join(PARTIAL_KINDS)}, "
            "ring_<hop>[_<hop>...]."
        )
    wanted = [int(hop) for hop in hops]
    if max(wanted) >= grid.num_hops:
        raise ValueError(f"{kind!r}: hops of a {grid.rows} x {grid.cols} grid are 0 to {grid.num_hops - 1}.")
    inside = torch.isin(grid.hops(device), torch.tensor(wanted, device=device))
    mask[rest, rest] = (~inside).to(mask.dtype)
    return mask


@contextmanager
def without_attention(
    model: nn.Module | ViTLayout, layer: int, head: int, mask: torch.Tensor, renormalize: bool = False
) -> Iterator[None]:
    """Multiply the attention weights of one head by a mask within a `with` block.

    Args:
        model: a supported vision transformer.
        layer, head: the head.
        mask: `(tokens, tokens)`, as of [`partial_mask`].
        renormalize: normalise the rows to sum to 1. This measures a different quantity, so it is off by default.

    Raises:
        ValueError: for a head that the model does not have, and, when the model runs, for a mask of another size.
    """
    layout = model if isinstance(model, ViTLayout) else ViTLayout.of(model)
    layout.check_heads({layer: [head]})

    def tap(weights: torch.Tensor) -> torch.Tensor:
        if mask.shape != weights.shape[2:]:
            tokens = weights.shape[-1]
            raise ValueError(
                f"The mask must have the shape ({tokens}, {tokens}), for all tokens; got {tuple(mask.shape)}."
            )
        weights = weights.clone()
        kept = weights[:, head] * mask.to(weights)
        if renormalize:
            kept = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
        weights[:, head] = kept
        return weights

    with tapped(layout, {layer: tap}):
        yield
