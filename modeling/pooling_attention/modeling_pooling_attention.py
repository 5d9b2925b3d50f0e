# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Text embedders made from decoders, in the five designs of "Pooling And Attention" (arXiv 2409.02727)."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from hf_attn.architectures.decoder import DecoderModel, DecoderPreTrainedModel, FromLlamaMixin

from .configuration_pooling_attention import PoolingAttentionConfig
from .head import PoolingHead
from .sentence_transformers import write_modules


logger = logging.get_logger(__name__)

#: number of parameters from which on `from_base` warns about the cost of a head
_LARGE_HEAD = 100_000_000
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class PoolingAttentionPreTrainedModel(DecoderPreTrainedModel):
    config: PoolingAttentionConfig

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Its latents are a parameter of its own.
        cls._no_split_modules = [*cls._no_split_modules, "PoolingHead"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, PoolingHead):
            module.reset_parameters(self.config.pooling_std, self.config.pooling_init)
        elif not getattr(module, "_is_in_pooling_head", False):
            super()._init_weights(module)


class PoolingAttentionDecoder(PoolingAttentionPreTrainedModel, DecoderModel):
    """The decoder, causal or not, which shows the output of each layer."""

    def run_layers(
        self,
        layers: nn.ModuleList,
        hidden_states: torch.Tensor,
        masks: dict,
        see_layer: Callable[[torch.Tensor], None] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Run the layers.

        Args:
            see_layer: called with the output of every layer but the last, whose output has yet to be normalised.

        The other arguments are those of `DecoderModel.run_layers`.
        """
        for index, layer in enumerate(layers):
            hidden_states = layer(hidden_states, attention_mask=masks[layer.self_attn.mask_kind], **kwargs)
            if see_layer is not None and index < len(layers) - 1:
                see_layer(hidden_states)
        return hidden_states


class PoolingAttentionModel(FromLlamaMixin, PoolingAttentionPreTrainedModel):
    """Text embedding model, one unit vector per text: a decoder and a trainable head, according to `config.design`.

    Padding on either side does not change an embedding. Texts end with the end-of-sequence token, see
    [`~hf_attn.modeling.pooling_attention.tokenization.embedding_tokenizer`].

    `attn_implementation="eager"` computes the head as the paper's equation reads, too.
    """

    def __init__(self, config: PoolingAttentionConfig):
        super().__init__(config)
        self.model = PoolingAttentionDecoder(config)
        self.head = None
        if config.has_head:
            self.head = PoolingHead(
                config.hidden_size,
                config.num_latents,
                config.num_pooling_heads,
                config.pooling_head_dim,
                num_layers=config.num_hidden_layers if config.pools_layers else 0,
            )
            for module in self.head.modules():
                module._is_in_pooling_head = True
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embed texts.

        Args:
            input_ids: `(batch, length)`, each text ending with the end-of-sequence token; either these or `inputs_embeds`
                `(batch, length, hidden_size)`.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding.
            position_ids: `(batch, length)`; counted over the padding too if not given.

        Returns:
            `pooler_output`, the embeddings `(batch, hidden_size)` of length 1, and `last_hidden_state`.

        Raises:
            ValueError: for an empty batch, a text without tokens, or a mask of pairs of tokens.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.numel() == 0:
            raise ValueError(f"There is no token to embed: {'no input' if given is None else tuple(given.shape)}.")
        tokens = self._tokens(attention_mask, given.shape[:2], given.device)
        layers = []
        if self.config.pools_layers:
            averaged = self._averaged(tokens, input_ids)

            def see_layer(hidden_states):
                layers.append(self._pool_layer(hidden_states, tokens, averaged))

            kwargs["see_layer"] = see_layer
        kwargs.pop("use_cache", None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        states = output.last_hidden_state
        tokens = tokens.to(states.device)
        if self.config.design == 1:
            embedding = last_token(states, tokens)
        elif self.config.design == 2:
            embedding = self._run_head(last_token(states, tokens)[:, None])
        elif self.config.design == 4:
            embedding = self._run_head(states, None if attention_mask is None else tokens)
        else:
            layers.append(self._pool_layer(states, tokens, averaged))
            embedding = self._run_head(torch.stack([layer.to(states.device) for layer in layers], dim=1))
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=F.normalize(embedding, dim=-1),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _tokens(
        self, attention_mask: torch.Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """Which positions are tokens, boolean `(batch, length)`."""
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        if tuple(attention_mask.shape) != tuple(shape):
            raise ValueError(
                f"attention_mask must have the shape (batch, length) = {tuple(shape)}, got "
                f"{tuple(attention_mask.shape)}. Pooling needs it to exclude padding."
            )
        tokens = attention_mask.to(device).bool()
        if not torch.compiler.is_compiling() and not bool(tokens.any(dim=1).all()):
            empty = (~tokens.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"Rows {empty} of attention_mask have no tokens. Use a tokenizer from embedding_tokenizer, which "
                "appends an end-of-sequence token even to empty texts."
            )
        return tokens

    def _averaged(self, tokens: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Which positions design 5 takes the mean over."""
        if self.config.mean_over == "attention_mask" or self.config.design != 5:
            return tokens
        if input_ids is None:
            raise ValueError(
                "mean_over='pad_token_id' needs input_ids to find the padding tokens, but they were not passed."
            )
        return input_ids != self.config.pad_token_id

    def _pool_layer(self, states: torch.Tensor, tokens: torch.Tensor, averaged: torch.Tensor) -> torch.Tensor:
        if self.config.design == 3:
            return last_token(states, tokens)
        weights = averaged.to(states.device, states.dtype)[..., None]
        # By the official rule, a text that consists only of padding tokens has no mean.
        return (states.where(weights > 0, 0)).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def _run_head(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(states, mask, eager=self.config._attn_implementation == "eager")

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs):
        """Save the model, with the files from which `SentenceTransformer(folder)` loads it unless the folder has them.

        The tokenizer, saved to the same folder, has to be one from `embedding_tokenizer`.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.should_save_on_this_rank(is_main_process) and not getattr(self, "_hf_peft_config_loaded", False):
            write_modules(save_directory, self.config)

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> PoolingAttentionConfig:
        """The configuration for a base; a bidirectional design loses the base's sliding windows.

        Raises:
            ValueError: for another architecture than those of the decoder body.
        """
        if getattr(base_config, "is_encoder_decoder", False) or not hasattr(base_config, "num_hidden_layers"):
            raise ValueError(
                f"A {base_config.model_type!r} model is not a decoder, so its hidden states cannot be used as "
                "embeddings."
            )
        design = overrides.get("design", getattr(base_config, "design", 5))
        if design in (4, 5):
            overrides = {"sliding_window": None, "layer_types": None, **overrides}
        elif "num_hidden_layers" in overrides and getattr(base_config, "layer_types", None) is not None:
            overrides = {"layer_types": base_config.layer_types[: overrides["num_hidden_layers"]], **overrides}
        overrides.setdefault("use_cache", False)
        return super().config_from_base(base_config, **overrides)

    @classmethod
    def state_from_base(cls, state: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Names of a base with or without a head, as the names of this model."""
        return {
            name if name.startswith(("model.", "head.")) else f"model.{name}": tensor for name, tensor in state.items()
        }

    @classmethod
    def dropped_from_base(cls, name: str, config: PreTrainedConfig) -> bool:
        """The language modelling head, layers above `num_hidden_layers`, and a head that the design does not have."""
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= config.num_hidden_layers:
            return True
        return name == "lm_head.weight" or (name.startswith("head.") and not config.has_head)

    @classmethod
    def new_to_base(cls, name: str, config: PreTrainedConfig) -> bool:
        """The trainable head."""
        return name.startswith("head.")

    @classmethod
    def from_base(cls, base, dtype=None, **overrides):
        """Make an embedder from a pretrained Llama, Mistral, Qwen2 or Qwen3; see `FromBaseMixin.from_base`.

            model = PoolingAttentionModel.from_base("HuggingFaceTB/SmolLM2-135M", design=5, num_latents=64, pooling_head_dim=64)

        The official sizes of the head are the defaults; a warning gives their cost. `num_hidden_layers` keeps the lowest
        layers only.
        """
        model = super().from_base(base, dtype=dtype, **overrides)
        if model.head is not None:
            size = sum(parameter.numel() for parameter in model.head.parameters())
            if size > _LARGE_HEAD:
                config = model.config
                inner = config.num_pooling_heads * config.pooling_head_dim
                flop = config.num_latents * config.hidden_size * (4 * inner + 24 * config.hidden_size)
                logger.warning(
                    f"The head has {size:,} parameters and costs {flop / 1e12:.2f} TFLOP per text in its official form "
                    f"(num_latents={config.num_latents}, num_pooling_heads={config.num_pooling_heads}, "
                    f"pooling_head_dim={config.pooling_head_dim}). For a smaller head, pass num_latents=64, "
                    "num_pooling_heads=8, pooling_head_dim=64."
                )
        return model


def last_token(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The state of the last token of each row, `(batch, width)`, whichever side the padding is on.

    Args:
        states: `(batch, length, width)`.
        tokens: boolean `(batch, length)`, false for padding.
    """
    positions = torch.arange(tokens.shape[1], device=states.device)
    last = torch.where(tokens.to(states.device), positions, -1).amax(dim=1)
    return states[torch.arange(len(states), device=states.device), last]


__all__ = ["PoolingAttentionModel", "PoolingAttentionPreTrainedModel"]
