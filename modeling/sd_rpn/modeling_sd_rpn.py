# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The region proposal network of SD-RPN (arXiv 2509.16944): where in an image a multimodal language model should look.

Decoder layers that branch off the base after its layer K - 1. All but the last run in full on the states h of the whole
prompt; the last one gives the query of the last prompt token and the keys of the image tokens:

    logit_j = mean over heads of  q . k_j / sqrt(head_dim),      RoI map = sigmoid(logits)

For LLaVA h passes a norm first and q, k are not rotated; for Qwen2.5-VL there is no norm and both are rotated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from hf_attn.checkpoints.from_base import FromBaseMixin
from hf_attn.hub import HubModelMixin

from .configuration_sd_rpn import SdRpnConfig


#: label of a cell that the loss leaves out
IGNORE_INDEX = -100


@dataclass
class SdRpnOutput(ModelOutput):
    """Output of an [`SdRpnModel`].

    Args:
        loss (`torch.FloatTensor`, *optional*): mean binary cross-entropy over the cells of the batch that are not ignored.
        logits (`torch.FloatTensor` of shape `(batch, cells)`, or `(batch, queries, cells)` if several query positions are
            given): logits of the RoI maps, one for each image token, in order; float32. Rows with fewer image tokens than
            others are filled up with `-inf`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class SdRpnAttention(LlamaAttention):
    """A Llama's attention whose output projection need not have a bias when the others have one, as in Qwen2.5-VL."""

    def __init__(self, config: SdRpnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.o_proj = nn.Linear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias
        )


class SdRpnDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: SdRpnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = SdRpnAttention(config, layer_idx)


class SdRpnPreTrainedModel(HubModelMixin, PreTrainedModel):
    config: SdRpnConfig
    base_model_prefix = "rpn"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    # Trainer counts items in `labels`, which there are none of here; SdRpnTrainer counts cells.
    accepts_loss_kwargs = False
    _no_split_modules = ["SdRpnDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class SdRpnModel(FromBaseMixin, SdRpnPreTrainedModel):
    """The region proposal network; the base is neither included nor changed.

    `from_base` copies layers K .. K+T-1 and the final norm of a base. Tensors that the map does not depend on are stored,
    as in the official checkpoints, and do not require gradients.
    """

    base_auto_class = AutoModelForImageTextToText

    def __init__(self, config: SdRpnConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [SdRpnDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()
        self._freeze_unused()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load; see transformers' `PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading replaces the parameters by ones that all require gradients.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unused()
        return loaded

    def _freeze_unused(self) -> None:
        last = self.layers[-1]
        unused = [last.self_attn.v_proj, last.self_attn.o_proj, last.post_attention_layernorm, last.mlp]
        if not self.config.use_norm:
            unused.append(self.norm)
        for module in unused:
            module.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        hidden_states: torch.FloatTensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        image_mask: torch.BoolTensor,
        attention_mask: torch.Tensor | None = None,
        query_positions: torch.LongTensor | None = None,
        roi_target_map: torch.Tensor | Sequence[torch.Tensor] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SdRpnOutput:
        """Logits of the RoI maps of a batch of prompts.

        Args:
            hidden_states: `(batch, sequence, hidden_size)`, output of the base's layer `branch_layer - 1`.
            position_embeddings: cosines and sines of the rotary embedding that the base's layers receive, each
                `(batch or 1, sequence, head_dim)`.
            image_mask: `(batch, sequence)`, true at the image tokens that are cells of a RoI map.
            attention_mask: `(batch, sequence)`, 1 at tokens and 0 at padding.
            query_positions: `(batch,)`, the token of each prompt that looks for the region, or `(batch, queries)`, several
                that have a map each; the last token if not given.
            roi_target_map: labels of the cells: 1 foreground, 0 background, -100 ignored. `(batch, cells)`, filled up with
                -100 where a row has fewer image tokens, or a list of one map of any shape for each row.
            num_items_in_batch: divisor of the summed cross-entropy; the labelled cells of this batch if not given.

        Raises:
            ValueError: if a row's labels and image tokens differ in number, or if there are labels for several queries.
        """
        batch, sequence = hidden_states.shape[:2]
        if query_positions is None:
            query_positions = last_positions(attention_mask, batch, sequence, hidden_states.device)
        if roi_target_map is not None and query_positions.ndim > 1:
            raise ValueError("roi_target_map labels the map of one query; give query_positions of shape (batch,).")
        # The last argument, the cache, has another name from transformers 5.24 on.
        causal_mask = create_causal_mask(self.config, hidden_states, attention_mask, None)
        for layer in self.layers[:-1]:
            hidden_states = layer(
                hidden_states, attention_mask=causal_mask, position_embeddings=position_embeddings, **kwargs
            )
        if self.config.use_norm:
            hidden_states = self.norm(hidden_states)

        image_mask = image_mask.bool()
        rows, positions = image_mask.nonzero(as_tuple=True)
        # Cell of each image token in the map of its row.
        cells = (image_mask.cumsum(dim=1) - 1)[rows, positions]
        logits = self._roi_logits(
            hidden_states, position_embeddings, query_positions.view(batch, -1), rows, positions, cells
        )
        if query_positions.ndim == 1:
            logits = logits[:, 0]

        loss = None
        if roi_target_map is not None:
            labels = _pad_labels(roi_target_map, image_mask.sum(dim=1).tolist(), logits.device)
            loss = roi_loss(logits[rows, cells], labels[rows, cells], num_items_in_batch)
        return SdRpnOutput(loss=loss, logits=logits)

    def _roi_logits(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        query_positions: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        cells: torch.Tensor,
    ) -> torch.Tensor:
        """Logits `(batch, queries, cells)`, `-inf` where a prompt has no such cell.

        Args:
            hidden_states, position_embeddings: see [`forward`].
            query_positions: `(batch, queries)`.
            rows, positions, cells: `(image tokens of the batch,)`: token `positions[i]` of prompt `rows[i]` is cell
                `cells[i]` of its map.
        """
        layer = self.layers[-1]
        attention = layer.self_attn
        batch = len(hidden_states)

        def heads_of(projection: nn.Linear, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            states = projection(layer.input_layernorm(hidden_states[row, position]))
            states = states.unflatten(-1, (states.shape[-1] // attention.head_dim, attention.head_dim))
            if not self.config.use_rope:
                return states
            cos, sin = (table.expand(batch, -1, -1)[row, position] for table in position_embeddings)
            return apply_rotary_pos_emb(states, states, cos, sin, unsqueeze_dim=-2)[0]

        query = heads_of(attention.q_proj, torch.arange(batch, device=rows.device)[:, None], query_positions).float()
        key_of_token = heads_of(attention.k_proj, rows, positions).float()
        key_of_token = key_of_token.repeat_interleave(attention.num_key_value_groups, dim=1)
        counts = rows.bincount(minlength=batch)
        width = int(counts.max())
        key = key_of_token.new_zeros(batch, width, *key_of_token.shape[1:]).index_put((rows, cells), key_of_token)
        logits = torch.einsum("bqhd,bkhd->bqk", query, key)
        if self.config.multi_head:
            logits = logits / query.shape[2] * attention.scaling
        is_cell = torch.arange(width, device=rows.device) < counts[:, None]
        return logits.masked_fill(~is_cell[:, None], -torch.inf)

    # --- from a base ------------------------------------------------------------------------------------------------

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> SdRpnConfig:
        """Configuration for a base of type LLaVA, LLaVA-Next or Qwen2.5-VL.

        `branch_layer`, `num_hidden_layers` and `thresholds` are the paper's if it has a network for a base of this size.

        Raises:
            ValueError: for another architecture, and if `branch_layer` is not given for a base of another size.
        """
        if base_config.model_type not in ("llava", "llava_next", "qwen2_5_vl"):
            raise ValueError(
                f"SD-RPN does not support {base_config.model_type!r} models. Supported bases: llava, llava_next, "
                "qwen2_5_vl."
            )
        text = base_config.get_text_config()
        biases = LANGUAGE_MODELS.get(text.model_type)
        if biases is None:
            raise ValueError(
                f"SD-RPN does not support the language model {text.model_type!r} of the base. Supported: "
                f"{', '.join(LANGUAGE_MODELS)}."
            )
        if getattr(text, "sliding_window", None) is not None:
            raise ValueError(
                "SD-RPN attends to the whole prompt and does not support a base with sliding-window attention."
            )
        values = {
            "base_model_type": base_config.model_type,
            "base_model_name_or_path": base_config.name_or_path or None,
            "base_num_hidden_layers": text.num_hidden_layers,
            **{name: getattr(text, name) for name in _SHARED_FIELDS},
            "head_dim": getattr(text, "head_dim", None),
            **biases(text),
            **_published_choices(base_config.model_type, text),
            **overrides,
        }
        if "branch_layer" not in values:
            raise ValueError(
                f"There is no published SD-RPN for a {base_config.model_type} with {text.num_hidden_layers} layers of "
                f"width {text.hidden_size}. Pass branch_layer, the number of base layers before the network (about "
                "half of the layers in the paper)."
            )
        return SdRpnConfig(**values)

    @classmethod
    def state_from_base(cls, state: dict[str, torch.Tensor], config: SdRpnConfig) -> dict[str, torch.Tensor]:
        return {_own_name(name, config): tensor for name, tensor in state.items()}

    @classmethod
    def dropped_from_base(cls, name: str, config: SdRpnConfig) -> bool:
        return _own_name(name, config) is None


def roi_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean binary cross-entropy over the cells that are not ignored; zero, with zero gradients, if all are.

    Args:
        logits, labels: of the same shape; a label is 1 (foreground), 0 (background) or -100 (ignored).
        num_items_in_batch: number of cells that are not ignored in all batches of an optimizer step, by which the sum is
            divided in place of those of this batch.
    """
    valid = labels != IGNORE_INDEX
    if not valid.any():
        return 0.0 * logits.sum()
    logits, labels = logits[valid], labels[valid].to(logits.dtype)
    if num_items_in_batch is None:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / num_items_in_batch


def last_positions(attention_mask: torch.Tensor | None, batch: int, sequence: int, device) -> torch.Tensor:
    """Position `(batch,)` of the last token of each row that is not padding, for padding on either side."""
    positions = torch.arange(sequence, device=device)
    if attention_mask is None:
        return positions[-1:].expand(batch)
    return (positions * attention_mask.to(device).bool()).amax(dim=1)


def _pad_labels(maps: torch.Tensor | Sequence[torch.Tensor], lengths: list[int], device: torch.device) -> torch.Tensor:
    """Labels `(batch, cells)`, filled up with -100."""
    if len(maps) != len(lengths):
        raise ValueError(f"roi_target_map has {len(maps)} maps for a batch of {len(lengths)} prompts.")
    flat = [torch.as_tensor(labels, device=device).flatten() for labels in maps]
    for row, (labels, length) in enumerate(zip(flat, lengths, strict=True)):
        if len(labels) < length or (labels[length:] != IGNORE_INDEX).any():
            raise ValueError(
                f"roi_target_map of prompt {row} has {len(labels)} labels, but the prompt has {length} image tokens."
            )
    width = max(lengths)
    return torch.stack(
        [nn.functional.pad(labels[:width], (0, width - len(labels[:width])), value=IGNORE_INDEX) for labels in flat]
    )


#: fields that a network has in common with the language model of its base
_SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "attention_dropout",
    "initializer_range",
)


def _llama_biases(text: PreTrainedConfig) -> dict:
    return {"attention_bias": text.attention_bias, "mlp_bias": text.mlp_bias}


def _no_biases(text: PreTrainedConfig) -> dict:
    return {}


def _qwen_biases(text: PreTrainedConfig) -> dict:
    return {"attention_bias": True, "attention_output_bias": False}


#: type of a base's language model -> the biases of its layers
LANGUAGE_MODELS = {
    "llama": _llama_biases,
    "mistral": _no_biases,
    "qwen2": _qwen_biases,
    "qwen2_5_vl_text": _qwen_biases,
}


def _published_choices(base_model_type: str, text: PreTrainedConfig) -> dict:
    """Settings of the paper for a base of this size, if there are any."""
    for variant in SdRpnConfig.variants:
        config = SdRpnConfig.from_variant(variant)
        if (config.base_model_type, config.base_num_hidden_layers, config.hidden_size) == (
            base_model_type,
            text.num_hidden_layers,
            text.hidden_size,
        ):
            return {name: getattr(config, name) for name in ("branch_layer", "num_hidden_layers", "thresholds")}
    return {}


def _own_name(name: str, config: SdRpnConfig) -> str | None:
    """Name of a base's tensor in the network, if it is one of those that are copied."""
    name = name.removeprefix("model.").removeprefix("language_model.")
    if name == "norm.weight":
        return name
    parts = name.split(".", 2)
    if parts[0] == "layers" and 0 <= int(parts[1]) - config.branch_layer < config.num_hidden_layers:
        return f"layers.{int(parts[1]) - config.branch_layer}.{parts[2]}"
    return None


__all__ = ["SdRpnModel", "SdRpnOutput", "SdRpnPreTrainedModel", "roi_loss"]
