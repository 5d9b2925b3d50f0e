"""Where a multimodal model looks while it answers: the attention that pseudo-labels are made of.

The rows of the answer's tokens come from one pass over prompt and answer, with any attention implementation the
model has: hooks recompute the softmax of the few heads that matter, and nothing else of any attention map is ever held.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_attn.modeling.sd_rpn.first_pass import ImageCells, find_images, states_before


@dataclass(frozen=True)
class AttentionRecipe:
    """Which attention labels a base model's images, and by which rule.

    Attributes:
        grounding: layer -> heads that attend to the object in question, all counted from 0.
        sink: layer -> heads that mark sinks; `None` for all heads of the layer. Without layers there are no sinks.
        rule: whose labelling rule to follow.
        sink_threshold: mean sink attention from which a cell is a sink.
    """

    grounding: Mapping[int, Sequence[int]]
    sink: Mapping[int, Sequence[int] | None]
    rule: Literal["llava", "qwen"]
    sink_threshold: float

    def __post_init__(self):
        if not self.grounding or not all(self.grounding.values()):
            raise ValueError(f"A recipe needs heads in each layer of `grounding`, got {self.grounding}.")
        if self.rule not in ("llava", "qwen"):
            raise ValueError(f"rule must be 'llava' or 'qwen', got {self.rule!r}.")


#: base model and, for Qwen2.5-VL, kind of images -> heads used by the official scripts
RECIPES = {
    ("llava-1.5-7b", None): AttentionRecipe({14: (13, 24, 26)}, {2: None}, "llava", 1e-3),
    ("llava-1.5-13b", None): AttentionRecipe(
        {13: (21, 23, 26), 15: (2,), 16: (2, 21, 30)}, {16: (17, 22)}, "llava", 1e-3
    ),
    ("qwen2.5-vl-7b", "natural"): AttentionRecipe({16: (1, 7, 17), 19: (17, 20)}, {9: (4, 22)}, "qwen", 1e-2),
    ("qwen2.5-vl-7b", "text"): AttentionRecipe({22: (1, 4), 23: (6, 11)}, {}, "qwen", 1e-2),
    ("qwen2.5-vl-3b", "natural"): AttentionRecipe({21: (9, 11), 22: (0, 7)}, {8: (1, 13)}, "qwen", 1e-2),
    ("qwen2.5-vl-3b", "text"): AttentionRecipe({20: (1, 4), 22: (14,)}, {}, "qwen", 1e-2),
}


def attention_recipe(base_model: str, images: Literal["natural", "text"] = "natural") -> AttentionRecipe:
    """The published recipe of a base model.

    Args:
        base_model: Hub id or folder whose last part names the model, as in `llava-hf/llava-1.5-7b-hf`.
        images: for Qwen2.5-VL, whether the images are photographs or text.

    Raises:
        ValueError: if there is no recipe for this model, or no such kind of images.
    """
    if images not in ("natural", "text"):
        raise ValueError(f"images must be 'natural' or 'text', got {images!r}.")
    name = re.sub(r"v(?=1\.5)", "", base_model.rstrip("/").rsplit("/", 1)[-1].lower())
    for (known, kind), recipe in RECIPES.items():
        if re.search(rf"(^|[^a-z0-9]){re.escape(known)}([^a-z0-9]|$)", name) and kind in (None, images):
            return recipe
    known = ", ".join(dict.fromkeys(known for known, _ in RECIPES))
    raise ValueError(
        f"No published choice of heads for {base_model!r}. There is one for {known}. For another model, choose layers "
        "and heads yourself: AttentionRecipe(grounding={layer: heads}, ...)."
    )


@dataclass(frozen=True)
class AnswerAttention:
    """Attention of an answer to the image tokens of its prompt, mean over rows and heads.

    Attributes:
        grounding: float32 `(rows, columns)` of the image's grid, in the heads that attend to the object.
        sink: the same in the heads that mark sinks.
    """

    grounding: torch.Tensor
    sink: torch.Tensor


@torch.no_grad()
def answer_attention(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    answers: Sequence[torch.Tensor],
    recipe: AttentionRecipe,
) -> list[AnswerAttention | None]:
    """Attention with which a model generated its answers, recomputed in one pass up to the last layer of the recipe.

    Args:
        model: LLaVA, LLaVA-Next or Qwen2.5-VL for conditional generation.
        inputs: what its processor made of the prompts, each with one image, padded on the left if they differ in length.
        answers: the tokens generated for each prompt, `(tokens,)`, with the one that ended it. The attention of the last
            one is not used: it was never fed back.
        recipe: the heads.

    Returns:
        For each prompt its attention, or `None` if the answer has a single token and thus no row.

    Raises:
        ValueError: if an answer is empty or has an image token in it, a prompt has not one image, the model lacks a layer
            or head, or `mm_token_type_ids` are missing that the model's positions depend on.
    """
    batch, prompt_length = inputs["input_ids"].shape
    if len(answers) != batch or not all(len(answer) for answer in answers):
        raise ValueError(f"There must be a non-empty answer for each of the {batch} prompts.")
    images = find_images(model.config, inputs["input_ids"], inputs.get("image_sizes"), inputs.get("image_grid_thw"))
    if [image.row for image in images] != list(range(batch)):
        counts = [sum(image.row == row for image in images) for row in range(batch)]
        raise ValueError(f"Each prompt must have one image, got {counts}.")
    if any((answer == model.config.image_token_id).any() for answer in answers):
        raise ValueError("An answer contains an image token. Generate with `suppress_tokens=[image_token_id]`.")
    layers = model.get_decoder().layers
    _check_recipe(recipe, layers)
    extended, row_mask = _with_answers(model, inputs, answers)
    if not row_mask.any():
        return [None] * batch

    weights = {"grounding": [], "sink": []}

    def record(layer: int, states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]):
        for name, chosen in weights.items():
            if layer in getattr(recipe, name):
                rows = attention_rows(
                    layers[layer].self_attn,
                    states,
                    position_embeddings,
                    extended["attention_mask"],
                    prompt_length,
                    getattr(recipe, name)[layer],
                )
                chosen.append(rows[..., :prompt_length])

    with _recorded(layers, {*recipe.grounding, *recipe.sink}, record):
        states_before(layers[max([*recipe.grounding, *recipe.sink])], model, **extended, use_cache=False)
    grounding = average_attention(weights["grounding"], row_mask)
    sink = average_attention(weights["sink"], row_mask) if weights["sink"] else torch.zeros_like(grounding)
    return [
        AnswerAttention(_cells(image, grounding), _cells(image, sink)) if has_rows else None
        for image, has_rows in zip(images, row_mask.any(1), strict=True)
    ]


def average_attention(weights: Sequence[torch.Tensor], row_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over rows and heads of several layers, with equal weights for all heads.

    Args:
        weights: `(batch, heads, rows, keys)` of each layer.
        row_mask: bool `(batch, rows)` of the rows that count; all if not given. A sample without one gets zeros.

    Returns:
        `(batch, keys)`.
    """
    over_heads = torch.cat(list(weights), 1).mean(1)
    if row_mask is None:
        return over_heads.mean(1)
    row_mask = row_mask.to(over_heads.dtype)[..., None]
    return (over_heads * row_mask).sum(1) / row_mask.sum(1).clamp(min=1)


def attention_rows(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    first_row: int,
    heads: Sequence[int] | None = None,
) -> torch.Tensor:
    """The last rows of some heads' causal attention map, as eager attention would compute them.

    Args:
        attention: self-attention module of a Llama or Qwen2.5-VL layer.
        hidden_states: its input `(batch, tokens, hidden_size)`.
        position_embeddings: cosine and sine of the rotary embedding `(batch or 1, tokens, head_dim)`.
        attention_mask: `(batch, tokens)`, 0 for padding.
        first_row: the first query token; all later ones follow.
        heads: query heads, all of them if not given.

    Returns:
        float32 `(batch, heads, tokens - first_row, tokens)`.
    """
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    batch, tokens, _ = hidden_states.shape
    query = attention.q_proj(hidden_states[:, first_row:]).view(batch, tokens - first_row, -1, attention.head_dim)
    key = attention.k_proj(hidden_states).view(batch, tokens, -1, attention.head_dim)
    chosen = torch.arange(query.shape[2]) if heads is None else torch.tensor(heads)
    query = query.transpose(1, 2)[:, chosen]
    key = key.transpose(1, 2)[:, chosen // attention.num_key_value_groups]
    cos, sin = position_embeddings
    query, _ = rotate(query, query, cos[:, first_row:], sin[:, first_row:])
    _, key = rotate(key, key, cos, sin)

    position = torch.arange(tokens, device=key.device)
    visible = (position <= position[first_row:, None]) & attention_mask.bool()[:, None, None]
    scores = (query @ key.transpose(2, 3)) * attention.scaling
    return scores.float().masked_fill(~visible, -torch.inf).softmax(-1)


@contextmanager
def _recorded(layers: nn.ModuleList, chosen: set[int], record) -> Iterator[None]:
    """Call `record(layer, input of its attention, position_embeddings)` before some layers run."""

    def hook_for(layer: int):
        def hook(module, arguments, kwargs):
            record(layer, module.input_layernorm(arguments[0]), kwargs["position_embeddings"])

        return hook

    handles = [layers[i].register_forward_pre_hook(hook_for(i), with_kwargs=True) for i in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cells(image: ImageCells, attention: torch.Tensor) -> torch.Tensor:
    return attention[image.row, image.start : image.start + image.num_cells].view(image.grid)


def _check_recipe(recipe: AttentionRecipe, layers: nn.ModuleList) -> None:
    for layer, heads in [*recipe.grounding.items(), *recipe.sink.items()]:
        if not 0 <= layer < len(layers):
            raise ValueError(f"The recipe uses layer {layer}, but the model has {len(layers)} layers.")
        attention = layers[layer].self_attn
        count = attention.q_proj.out_features // attention.head_dim
        if heads is not None and not all(0 <= head < count for head in heads):
            raise ValueError(f"The recipe uses heads {tuple(heads)} of layer {layer}, which has {count} heads.")
        if getattr(attention, "sliding_window", None) is not None:
            raise ValueError(f"Layer {layer} has a sliding window, in which queries do not attend to the whole image.")


def _with_answers(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], answers: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of prompts followed by all of their answers but the last token, and which rows `(batch, rows)` are real."""
    input_ids = inputs["input_ids"]
    row_mask = torch.zeros(len(answers), max(map(len, answers)) - 1, dtype=torch.bool, device=input_ids.device)
    # Padding is masked; it only must not be an image token.
    padding = answers[0][0].item()
    added_ids = torch.full_like(row_mask, padding, dtype=input_ids.dtype)
    for i, answer in enumerate(answers):
        added_ids[i, : len(answer) - 1] = answer[:-1]
        row_mask[i, : len(answer) - 1] = True
    attention_mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(input_ids)
    attention_mask = torch.cat([attention_mask, row_mask.to(attention_mask.dtype)], 1)
    extended = {**inputs, "input_ids": torch.cat([input_ids, added_ids], 1), "attention_mask": attention_mask}
    if not hasattr(model.model, "compute_3d_position_ids"):
        # As `generate` counts them.
        extended["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    elif "mm_token_type_ids" not in inputs:
        raise ValueError(f"{type(model).__name__} needs the processor's mm_token_type_ids, on which positions depend.")
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        extended["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(row_mask, dtype=types.dtype)], 1)
    return extended, row_mask
