"""The decoder without and with a language modelling head."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaPreTrainedModel, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...hub import HubModelMixin
from .cache import CACHE, StateLayer, adopt_cache, takes_cache
from .configuration import DecoderConfig
from .layers import DecoderLayer, Mixer, make_norm


class DecoderPreTrainedModel(HubModelMixin, LlamaPreTrainedModel):
    """Base of the models of a family.

    Attributes:
        layer_class: layers of the family.
    """

    config: DecoderConfig
    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Mixer}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # accelerate compares names of classes
        cls._no_split_modules = [cls.layer_class.__name__]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for the attention interface in the file of the family; it is in this package.
        return True


class DecoderModel(DecoderPreTrainedModel):
    """The decoder without a head."""

    #: kind of mask -> function that creates it
    mask_functions: ClassVar[dict[str, Callable]] = {
        "full_attention": create_causal_mask,
        "sliding_attention": create_sliding_window_causal_mask,
    }

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = self.make_embedding(config)
        self.layers = nn.ModuleList(
            [self.layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = self.make_norm(config)
        self.rotary_emb = self.make_rotary_embedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def make_embedding(self, config: DecoderConfig) -> nn.Embedding:
        """The embedding of tokens; as in transformers, that of the padding token is zero and not trained."""
        return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)

    def make_norm(self, config: DecoderConfig) -> nn.Module:
        """The norm after the last layer."""
        return make_norm(config)

    def make_rotary_embedding(self, config: DecoderConfig) -> nn.Module | None:
        """The rotary embedding, or `None` for a model without one."""
        return LlamaRotaryEmbedding(config=config)

    def embed_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings with what positions add to them; nothing here."""
        return inputs_embeds

    @merge_with_config_defaults
    @capture_outputs
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `(batch, length)`; either these or `inputs_embeds` `(batch, length, hidden_size)`.
            attention_mask: `(batch, past + length)`, 1 for tokens and 0 for padding, or 4-D.
            position_ids: `(batch, length)`; counted from the end of the cache if not given.
            cache: cache of the earlier tokens, also under its old name `past_key_values`.
            use_cache: whether to return a cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        layers = self.layers[: self.config.num_hidden_layers]
        if isinstance(cache, Cache):
            adopt_cache(cache, (layer.self_attn for layer in layers))

        past_length = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)
        masks = self.make_masks(
            layers,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **self.mask_arguments(input_ids, attention_mask, past_length),
        )
        hidden_states = self.embed_positions(inputs_embeds, position_ids)
        hidden_states = self.run_layers(
            layers,
            hidden_states,
            masks,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **self.layer_arguments(hidden_states, position_ids, past_length),
            **kwargs,
        )
        if cache is not None:
            for layer in layers:
                kept = cache.layers[layer.self_attn.layer_idx]
                if isinstance(kept, StateLayer):
                    kept.seen_tokens += inputs_embeds.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def make_masks(self, layers: nn.ModuleList, *, attention_mask, inputs_embeds, position_ids, **kwargs) -> dict:
        """The masks that layers need, by their kind.

        Args:
            layers: layers that will be run.
            attention_mask: of the caller; a dictionary by kinds if `generate` has made the masks.
            kwargs: further arguments of transformers' mask functions.

        Raises:
            ValueError: if a mixer without keys is given a mask for pairs of tokens, or several sequences in a row.
        """
        if isinstance(attention_mask, dict):
            return attention_mask
        cache = kwargs.get(CACHE)
        static = isinstance(cache, Cache) and any(isinstance(kept, StaticLayer) for kept in cache.layers)
        if static and not cache.is_compileable:
            # transformers leaves out masks that only say "causal", unless a cache can be compiled: then it has empty slots.
            # Together with states, these slots are in a cache that does not support it.
            kwargs.setdefault("and_mask_function", _allow_everything)
        masks = {}
        for kind in sorted({layer.self_attn.mask_kind for layer in layers}):
            if kind == "padding":
                masks[kind] = _padding_of_input(attention_mask, position_ids, inputs_embeds.shape[1])
            else:
                masks[kind] = self.mask_functions[kind](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **kwargs,
                )
        return masks

    def mask_arguments(self, input_ids: torch.Tensor | None, attention_mask, past_length) -> dict:
        """Further arguments of transformers' mask functions, such as `and_mask_function`."""
        return {}

    def layer_arguments(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, past_length) -> dict:
        """Arguments that all layers share, besides those that every model has.

        Args:
            hidden_states: `(batch, length, hidden_size)`, input of the first layer.
            position_ids: `(batch or 1, length)`.
            past_length: number of tokens in the cache; a tensor with a static cache.
        """
        if self.rotary_emb is None:
            return {}
        return {"position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids)}

    def run_layers(self, layers: nn.ModuleList, hidden_states: torch.Tensor, masks: dict, **kwargs) -> torch.Tensor:
        """Run the layers one after the other.

        Args:
            layers: layers to run.
            hidden_states: `(batch, length, hidden_size)`.
            masks: by `mask_kind` of the mixers.
            kwargs: arguments of all layers.
        """
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask=masks[layer.self_attn.mask_kind], **kwargs)
        return hidden_states


def _allow_everything(batch_idx, head_idx, q_idx, kv_idx):
    return q_idx.new_ones((), dtype=torch.bool)


def _padding_of_input(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor, length: int
) -> torch.Tensor | None:
    """Which tokens of the input are not padding, boolean `(batch, length)`; `None` if there is no mask."""
    if attention_mask is None:
        if length > 1 and position_ids.shape[0] > 1 and bool((position_ids.diff(dim=-1) <= 0).any()):
            raise ValueError(
                "position_ids restart within a row, so the row contains several sequences, which layers without keys "
                "cannot keep apart. Use one row per sequence, with padding and an attention_mask."
            )
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must have the shape (batch, length) for layers without keys, got "
            f"{tuple(attention_mask.shape)}: they do not support masks of token pairs."
        )
    return attention_mask[:, -length:].bool()


class DecoderForCausalLM(DecoderPreTrainedModel, LlamaForCausalLM):
    """The decoder with a language modelling head.

    Attributes:
        model_class: the family's model without a head.
    """

    model_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: DecoderConfig):
        # Not LlamaForCausalLM's, which would build a Llama first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # `generate` chooses masks by the class of the cache, before the first forward pass.
        if isinstance(model_kwargs.get(CACHE), Cache):
            layers = self.model.layers[: self.config.num_hidden_layers]
            adopt_cache(model_kwargs[CACHE], (layer.self_attn for layer in layers))
        return result
