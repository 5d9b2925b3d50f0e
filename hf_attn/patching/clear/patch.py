"""CLEAR (arXiv 2412.16112) on the FLUX, Chroma and SD3 transformers of diffusers, in place.

    apply_clear(pipe.transformer, radius=8)
    remove_clear(pipe.transformer)

Attention processors are replaced, nothing else: weights, pipelines, LoRA, ControlNets stay what they are. The token grid
is read from each call of the transformer and handed down with `joint_attention_kwargs`, so that size, batch and text
length may change from call to call, and a checkpointed block is computed again with the grid that it had. What a call
may hold in `joint_attention_kwargs`, beside what diffusers knows:

- `proportional_attention`: True scales logits by the length of the sequence, for high resolutions;
- `clear_grid`: the grid `(height, width)` in tokens, to be used instead of reading it from `img_ids`, which a graph
  compiled with `fullgraph=True` cannot do;
- `attention_mask`: padding of the text, `(batch, text)` or `(batch, text and image)` in the order of the model, boolean
  or additive.

For SD3 and Chroma the rule is this package's own inference from the paper: there is no official code for them. The
`attention_mask` of a Chroma transformer masks padding here, whether it is boolean or of zeros and ones; diffusers' own
attention adds one of zeros and ones to the logits.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ...attention.clear import CLEAR, check_cells, renamed_backend
from ..patterns import NameFilter, Patterns
from .processors import (
    ClearContext,
    ClearFluxProcessor,
    ClearProcessor,
    ClearSD3Processor,
    FluxAttnProcessor,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    diffusers,
)


# --- from the call of a transformer to its attention layers ------------------------------------------------------------


class _Architecture(NamedTuple):
    processor: type[ClearProcessor]
    replaceable: tuple[type, ...]
    arguments: tuple[str, ...]
    image_first: bool


_ARCHITECTURES = {
    diffusers.FluxTransformer2DModel: _Architecture(
        ClearFluxProcessor,
        (FluxAttnProcessor,),
        tuple(inspect.signature(diffusers.FluxTransformer2DModel.forward).parameters)[1:],
        image_first=False,
    ),
    diffusers.ChromaTransformer2DModel: _Architecture(
        ClearFluxProcessor,
        (FluxAttnProcessor,),
        tuple(inspect.signature(diffusers.ChromaTransformer2DModel.forward).parameters)[1:],
        image_first=False,
    ),
    diffusers.SD3Transformer2DModel: _Architecture(
        ClearSD3Processor,
        (JointAttnProcessor2_0, FusedJointAttnProcessor2_0),
        tuple(inspect.signature(diffusers.SD3Transformer2DModel.forward).parameters)[1:],
        image_first=True,
    ),
}


def _architecture(transformer: nn.Module) -> _Architecture:
    for model_class, architecture in _ARCHITECTURES.items():
        if isinstance(transformer, model_class):
            return architecture
    known = ", ".join(model_class.__name__ for model_class in _ARCHITECTURES)
    inner = ""
    for attribute in ("transformer", "_orig_mod", "get_base_model"):
        if hasattr(transformer, attribute):
            inner = f" Pass its `{attribute}{'()' if attribute == 'get_base_model' else ''}`."
            break
    raise TypeError(f"CLEAR supports {known} of diffusers, got a {type(transformer).__name__}.{inner}")


def raster_grid(img_ids: torch.Tensor) -> tuple[int, int]:
    """The grid of tokens whose FLUX position ids are given.

    Args:
        img_ids: `(height * width, 3)`, or with a leading batch dimension; columns 1 and 2 are row and column.

    Returns:
        `(height, width)`.

    Raises:
        ValueError: if the ids are not those of one image, row by row.
    """
    ids = (img_ids[0] if img_ids.dim() == 3 else img_ids).detach().float().cpu()
    rows, columns = ids[:, 1], ids[:, 2]
    width = int((rows == rows[0]).long().cumprod(0).sum())
    is_raster = rows.numel() % width == 0 and bool((ids[:, 0] == ids[0, 0]).all())
    if is_raster:
        rows, columns = rows.view(-1, width), columns.view(-1, width)
        # Pipelines round ids to bfloat16, in which neighbours beyond 256 may be equal.
        is_raster = bool(
            (rows == rows[:, :1]).all()
            and (rows.diff(dim=0) >= 0).all()
            and (columns == columns[:1]).all()
            and (columns.diff(dim=1) >= 0).all()
        )
    if not is_raster:
        raise ValueError(
            f"CLEAR needs the tokens of one image in row-major order, but the {rows.numel()} img_ids are not: for "
            "reference images (FLUX Kontext) and other token sets there is no published rule."
        )
    return rows.shape[0], width


def _text_mask(mask: torch.Tensor, text_length: int, image_length: int, image_first: bool) -> torch.Tensor:
    """The text's part of an `attention_mask`, boolean `(batch, text)`."""
    shape = tuple(mask.shape)
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[1] not in (text_length, text_length + image_length):
        raise ValueError(
            f"attention_mask has shape {shape}. With CLEAR it masks text and must have the shape (batch, "
            f"{text_length}) for the text, or (batch, {text_length + image_length}) for all tokens."
        )
    if mask.is_floating_point():
        masked = mask <= torch.finfo(torch.float16).min / 2
        if not (masked | (mask == 0)).all():
            raise ValueError(
                "With CLEAR, an additive attention_mask must contain only zeros and large negative numbers."
            )
        mask = ~masked
    mask = mask.bool()
    if mask.shape[1] == text_length:
        return mask
    lengths = (image_length, text_length) if image_first else (text_length, image_length)
    first, second = mask.split(lengths, dim=1)
    text, image = (second, first) if image_first else (first, second)
    if not image.all():
        raise ValueError("CLEAR cannot mask image tokens: attention_mask must be True for all of them.")
    return text


def _of_zeros_and_ones(mask: torch.Tensor) -> torch.Tensor:
    """The mask of a Chroma transformer, boolean."""
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            "With CLEAR, the attention_mask of a Chroma transformer must contain only zeros and ones, with 1 for "
            "tokens to keep."
        )
    return mask.bool()


def _pass_context(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the transformer: put the grid of this call into `joint_attention_kwargs`."""
    architecture = _architecture(transformer)
    arguments = dict(zip(architecture.arguments, args, strict=False)) | kwargs
    attention_kwargs = dict(arguments.get("joint_attention_kwargs") or {})
    if "ip_adapter_image_embeds" in attention_kwargs or "ip_hidden_states" in attention_kwargs:
        raise ValueError("CLEAR does not support the image tokens of an IP-Adapter. Call `remove_clear` to use one.")
    grid = attention_kwargs.pop("clear_grid", None)
    hidden_states = arguments["hidden_states"]
    if architecture.image_first:
        patch_size = transformer.config.patch_size
        grid = tuple(size // patch_size for size in hidden_states.shape[-2:])
        image_length = grid[0] * grid[1]
    else:
        grid = raster_grid(arguments["img_ids"]) if grid is None else tuple(grid)
        image_length = hidden_states.shape[1]
        if grid[0] * grid[1] != image_length:
            raise ValueError(f"The call has {image_length} image tokens, but a grid of {grid[0]} x {grid[1]}.")
    for down_factor in transformer._clear_down_factors:
        check_cells(grid, down_factor)
    text_mask = None
    mask = attention_kwargs.get("attention_mask")
    if arguments.get("attention_mask") is not None:
        mask = _of_zeros_and_ones(arguments["attention_mask"])
        if transformer._clear_is_everywhere:
            # Chroma would make masks of all pairs of tokens of it.
            arguments["attention_mask"] = None
    if mask is not None:
        text_length = arguments["encoder_hidden_states"].shape[1]
        text_mask = _text_mask(mask, text_length, image_length, architecture.image_first)
    attention_kwargs["clear_context"] = ClearContext(grid, text_mask)
    if isinstance(transformer, diffusers.ChromaTransformer2DModel) and transformer.gradient_checkpointing:
        _checkpoint_with_context(transformer, attention_kwargs, arguments.get("attention_mask"))
    return (), arguments | {"joint_attention_kwargs": attention_kwargs}


def _checkpoint_with_context(
    transformer: nn.Module, attention_kwargs: dict, attention_mask: torch.Tensor | None
) -> None:
    """Hand down, for this call, what diffusers' Chroma leaves out where it checkpoints its blocks.

    That are the `joint_attention_kwargs` of all blocks, and the `attention_mask` of those with one stream.
    """
    checkpoint = transformer._gradient_checkpointing_func
    # `scale` is for LoRA, and read before the blocks are called.
    attention_kwargs = {name: value for name, value in attention_kwargs.items() if name != "scale"}

    def checkpoint_block(block: nn.Module, *args: torch.Tensor | None):
        missing = {"joint_attention_kwargs": attention_kwargs}
        if block in set(transformer.single_transformer_blocks):
            missing["attention_mask"] = attention_mask
        return checkpoint(partial(block, **missing), *args)

    def restore(*_) -> None:
        transformer._gradient_checkpointing_func = checkpoint
        handle.remove()

    transformer._gradient_checkpointing_func = checkpoint_block
    handle = transformer.register_forward_hook(restore, always_call=True)


def _expect_clear(attn: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of changed attention layers: raises if another library has replaced our processor."""
    if not isinstance(attn.processor, ClearProcessor):
        raise ValueError(
            f"The CLEAR processor of this attention layer was replaced by a {type(attn.processor).__name__}, for "
            "example by `fuse_qkv_projections()` of SD3 or an IP-Adapter. Call `apply_clear` after replacing "
            "processors, or call `remove_clear` first."
        )


def _drop_context(attn: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of attention layers that were not patched: their processors do not accept our arguments."""
    return args, {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}


_OWN_ARGUMENTS = ("clear_context", "proportional_attention")


# --- what users call ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClearReport:
    """What [`apply_clear`] did.

    Attributes:
        changed: names of the attention layers whose processor is new or has other settings.
        skipped: name of an attention layer that was left as it was -> reason.
    """

    changed: tuple[str, ...]
    skipped: dict[str, str]


def clear_processors(transformer: nn.Module) -> dict[str, ClearProcessor]:
    """Name of an attention layer that attends locally -> its processor."""
    return {
        name.removesuffix(".processor"): processor
        for name, processor in transformer.attn_processors.items()
        if isinstance(processor, ClearProcessor)
    }


def apply_clear(
    transformer: nn.Module,
    radius: int,
    down_factor: int = 1,
    attn_implementation: str = "auto",
    include: Patterns = "*",
    exclude: Patterns = (),
    backend: str | None = None,
) -> ClearReport:
    """Let the image tokens of a diffusers transformer attend to a disc around them, in place.

    Applying again changes the settings of what is chosen; trained spatial weights stay where `down_factor` does. The
    pre-trained weights need the paper's distillation, or [`hf_attn.patching.clear.weights.load_clear_weights`].

    Args:
        transformer: `FluxTransformer2DModel`, `ChromaTransformer2DModel` or `SD3Transformer2DModel`.
        radius: of the disc, in tokens of 16 pixels; published are 8, 16 and 32. Cells at exactly this distance are
            outside.
        down_factor: side of the cells of tokens whose pooled keys all image tokens attend to as well; published is 4.
            1 for none. The grid of tokens must be divisible by it.
        attn_implementation: one of `"auto"`, `"tiles"` (CPU), `"flex"`, `"dense"`, `"eager"`. Where diffusers'
            `set_attention_backend` was called, with `"native"` or `"flex"`, that counts.
        include: pattern (as of `fnmatch`), or several, of the names of attention layers to change, such as
            `"transformer_blocks.0.*"`.
        exclude: pattern or patterns of names to leave as they are.
        backend: the old name of `attn_implementation`.

    Returns:
        Which attention layers were changed and which were not.

    Raises:
        TypeError: if the model is another one.
        ValueError: for settings that make no sense, patterns that choose nothing, or attention processors that are not
            the default ones of diffusers, which are not overwritten.
        ImportError: on importing this module without diffusers.
    """
    architecture = _architecture(transformer)
    for name, value in (("radius", radius), ("down_factor", down_factor)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, in tokens, got {value!r}.")
    attn_implementation = renamed_backend(attn_implementation, backend)
    CLEAR.implementation(attn_implementation)
    names = NameFilter(include, exclude)

    changed, skipped = [], {}
    chosen: dict[str, object] = {}
    for key, processor in transformer.attn_processors.items():
        name = key.removesuffix(".processor")
        reason = names.reason_to_skip(name)
        if reason is None:
            chosen[name] = processor
        else:
            skipped[name] = reason
    if not chosen:
        raise ValueError(
            f"No attention layer matches include={names.include} and exclude={names.exclude}. The layers have names "
            f"like {next(iter(skipped))}."
        )
    foreign = {
        name: type(processor).__name__
        for name, processor in chosen.items()
        if type(processor) not in (*architecture.replaceable, architecture.processor)
    }
    if foreign:
        name, processor = next(iter(foreign.items()))
        raise ValueError(
            f"{name} has a {processor}, which is not a default attention processor of diffusers and is not "
            f"overwritten ({len(foreign)} such layers). Remove it, or name the layers in `exclude`."
        )
    processors = dict(transformer.attn_processors)
    for name, processor in chosen.items():
        settings = (radius, down_factor, attn_implementation)
        if not isinstance(processor, ClearProcessor):
            changed.append(name)
            processors[f"{name}.processor"] = _new_processor(architecture, transformer, name, settings, processor)
        elif settings == (processor.radius, processor.down_factor, processor.attn_implementation):
            skipped[name] = "is already as requested"
        else:
            changed.append(name)
            if processor.down_factor == down_factor:
                processor.radius, processor.attn_implementation = radius, attn_implementation
            else:
                processors[f"{name}.processor"] = _new_processor(
                    architecture, transformer, name, settings, processor.replaced
                )
    transformer.set_attn_processor(processors)
    _hook(transformer)
    return ClearReport(tuple(changed), skipped)


def _new_processor(architecture, transformer, name, settings, replaced) -> ClearProcessor:
    attn = transformer.get_submodule(name)
    # Not those that are quantised or stored in eight bits.
    weights = [tensor for tensor in attn.parameters() if tensor.is_floating_point() and tensor.itemsize > 1]
    like = weights[0].detach() if weights else torch.empty(0, dtype=transformer.dtype)
    if like.is_meta:  # offloaded
        like = torch.empty(0, dtype=like.dtype)
    return architecture.processor(*settings, replaced, like=like).train(transformer.training)


def _unhook(transformer: nn.Module) -> None:
    for handle in transformer.__dict__.pop("_clear_handles", ()):
        handle.remove()
    transformer.__dict__.pop("_clear_down_factors", None)
    transformer.__dict__.pop("_clear_is_everywhere", None)


def _hook(transformer: nn.Module) -> None:
    _unhook(transformer)
    local = clear_processors(transformer)
    handles = [transformer.register_forward_pre_hook(_pass_context, with_kwargs=True)]
    for key in transformer.attn_processors:
        name = key.removesuffix(".processor")
        hook = _expect_clear if name in local else _drop_context
        handles.append(transformer.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    transformer._clear_handles = handles
    transformer._clear_is_everywhere = len(local) == len(transformer.attn_processors)
    transformer._clear_down_factors = sorted({processor.down_factor for processor in local.values()})


def remove_clear(transformer: nn.Module) -> tuple[str, ...]:
    """Undo [`apply_clear`]: every attention layer gets back the processor that it had, the same object.

    Weights that were loaded or trained since stay; spatial weights are dropped.

    Returns:
        Names of the attention layers that were changed back; none if there was nothing to undo.
    """
    _architecture(transformer)
    local = clear_processors(transformer)
    _unhook(transformer)
    if local:
        restored = {f"{name}.processor": processor.replaced for name, processor in local.items()}
        transformer.set_attn_processor(dict(transformer.attn_processors) | restored)
    return tuple(local)
