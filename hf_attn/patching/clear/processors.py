"""The attention of CLEAR in the layers of FLUX and SD3 of diffusers: processors, and their arguments."""

from typing import NamedTuple, Protocol

import torch
from torch import nn


# Further modules on diffusers take it from here, with this message.
try:
    import diffusers
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
except ImportError as error:
    raise ImportError("CLEAR needs diffusers: `pip install 'hf_attn[diffusers]'`.") from error

from ...attention.clear import clear_attention, proportional_scaling


__all__ = [
    "ClearContext",
    "ClearFluxProcessor",
    "ClearProcessor",
    "ClearSD3Processor",
    "FluxAttnProcessor",
    "FusedJointAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "diffusers",
]

#: name of a backend of diffusers' `set_attention_backend` -> ours
_DIFFUSERS_BACKENDS = {"native": "dense", "flex": "flex"}


class ImagePart(Protocol):
    """A part of an image that one of several processes computes; see [`hf_attn.patching.clear.parallel.Strip`]."""

    num_tokens: int

    def attend(self, query, key, value, *, radius, text_mask, scaling, attn_implementation) -> torch.Tensor:
        """CLEAR attention of the text and this part to the text and the whole image."""


class ClearContext(NamedTuple):
    """Arguments of attention for one call of a transformer.

    Attributes:
        grid: `(height, width)` of the image in tokens.
        text_mask: boolean `(batch, text)`, False for padding; None if there is none.
        strip: the part that this process computes; None for the whole image.
    """

    grid: tuple[int, int]
    text_mask: torch.Tensor | None
    strip: ImagePart | None = None


class ClearProcessor(nn.Module):
    """Base class of the processors of both models.

    Attributes:
        radius: of the disc, in tokens.
        down_factor: side of the cells of pooled keys, 1 for none.
        attn_implementation: name of an implementation of [`hf_attn.attention.clear.clear_attention`].
        replaced: the processor that was there before.
        spatial_weight: weights of the tokens of a cell `(1, 1, 1, d, 1, d, 1)`, trainable; None without pooled keys.
    """

    # Set by diffusers' `set_attention_backend` and `enable_parallelism`.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, radius: int, down_factor: int, attn_implementation: str, replaced: object, like: torch.Tensor):
        super().__init__()
        self.radius, self.down_factor, self.replaced = radius, down_factor, replaced
        self.attn_implementation = attn_implementation
        weight = None
        if down_factor > 1:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)
            weight = nn.Parameter(like.new_full(shape, 1 / down_factor**2))
        self.register_parameter("spatial_weight", weight)

    def extra_repr(self) -> str:
        return (
            f"radius={self.radius}, down_factor={self.down_factor}, attn_implementation={self.attn_implementation!r}"
        )

    def forward(self) -> torch.Tensor:
        """The spatial weight. With offloading, weights are loaded only during a module's `forward`."""
        return self.spatial_weight.clone()

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: ClearContext | None,
        text_length: int | None,
        proportional: bool,
    ) -> torch.Tensor:
        """Attention on `(batch, length, heads, head_dim)`, text first; returns `(batch, length, heads * head_dim)`.

        `text_length` is that of the tokens given, where these may be without the text of the call.
        """
        if context is None:
            raise ValueError(
                "A CLEAR processor was called without the grid of the image, which it gets from the transformer that "
                "`apply_clear` was used on. Call that transformer, not one of its layers."
            )
        if self._parallel_config is not None:
            raise ValueError("CLEAR does not support diffusers' context parallelism, which splits the grid of tokens.")
        grid, text_mask, strip = context
        image_length = grid[0] * grid[1]
        if text_length is None:
            text_length = query.shape[1] - (image_length if strip is None else strip.num_tokens)
        scaling = query.shape[-1] ** -0.5
        if proportional:
            scaling = proportional_scaling(query.shape[-1], text_length + image_length, pooled=self.down_factor > 1)
        dtype = query.dtype
        if torch.is_autocast_enabled(query.device.type):
            # Norms return float32 next to values in half precision, and autocast does not reach every implementation.
            dtype = torch.get_autocast_dtype(query.device.type)
        tokens = [states.transpose(1, 2).to(dtype) for states in (query, key, value)]
        spatial_weight = None if self.spatial_weight is None else self.forward().to(query.device)
        arguments = {
            "radius": self.radius,
            "text_mask": text_mask if text_length else None,
            "scaling": scaling,
            "attn_implementation": self._implementation(),
        }
        if strip is None:
            output = clear_attention(*tokens, grid=grid, spatial_weight=spatial_weight, **arguments)
        else:
            output = strip.attend(*tokens, **arguments)
        return output.transpose(1, 2).flatten(2).to(query.dtype)

    def _implementation(self) -> str:
        if self._attention_backend is None:
            return self.attn_implementation
        name = getattr(self._attention_backend, "value", self._attention_backend)
        if name not in _DIFFUSERS_BACKENDS:
            raise ValueError(
                f"The attention backend {name!r} of diffusers computes full attention. With CLEAR use "
                f"{' or '.join(map(repr, _DIFFUSERS_BACKENDS))}, or `reset_attention_backend()` and the "
                "`attn_implementation` of `apply_clear`."
            )
        return _DIFFUSERS_BACKENDS[name]


def _projections(attn, image, text):
    """Query, key and value of image and text tokens, `(batch, length, heads, head_dim)`, normalised; text ones may be None."""

    def project(states, fused, separate, norms):
        if attn.fused_projections:
            projected = getattr(attn, fused)(states).chunk(3, dim=-1)
        else:
            projected = [getattr(attn, name)(states) for name in separate]
        query, key, value = (states.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for states in projected)
        query, key = (
            states if norm is None else norm(states) for states, norm in zip((query, key), norms, strict=True)
        )
        return query, key, value

    image = project(image, "to_qkv", ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
    if text is None:
        return image, None
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    return image, project(text, "to_added_qkv", added, (attn.norm_added_q, attn.norm_added_k))


class ClearFluxProcessor(ClearProcessor):
    """For `FluxAttention`: double-stream blocks pass image and text, single-stream blocks text and image in one tensor."""

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        clear_context: ClearContext | None = None,
        proportional_attention: bool = False,
    ):
        tokens, text = _projections(attn, hidden_states, encoder_hidden_states)
        if text is not None:
            tokens = [torch.cat(parts, dim=1) for parts in zip(text, tokens, strict=True)]
        query, key, value = tokens
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        output = self.attend(query, key, value, clear_context, None, proportional_attention)
        if text is None:
            return output
        text_output, image_output = output.split([text[0].shape[1], hidden_states.shape[1]], dim=1)
        image_output = attn.to_out[1](attn.to_out[0](image_output.contiguous()))
        return image_output, attn.to_add_out(text_output.contiguous())


class ClearSD3Processor(ClearProcessor):
    """For the `Attention` of SD3: image tokens come first, and the second attention of a block has no text."""

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        clear_context: ClearContext | None = None,
        proportional_attention: bool = False,
    ):
        tokens, text = _projections(attn, hidden_states, encoder_hidden_states)
        text_length = 0
        if text is not None:
            text_length = encoder_hidden_states.shape[1]
            tokens = [torch.cat(parts, dim=1) for parts in zip(text, tokens, strict=True)]
        output = self.attend(*tokens, clear_context, text_length, proportional_attention)
        text_output, image_output = output[:, :text_length], output[:, text_length:]
        image_output = attn.to_out[1](attn.to_out[0](image_output))
        if text is None:
            return image_output
        return image_output, text_output if attn.context_pre_only else attn.to_add_out(text_output)
