# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Landmark attention (arXiv 2305.16300): a Llama-like model with random-access memory.

A landmark token closes every block of the text, and a token attends to the tokens of an earlier block through the weight
that it gives to the block's landmark. At inference it therefore needs to read only the few blocks whose landmarks it scores
highest, whatever the length of the text.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.attention.family import OwnAttentionMixin
from hf_attn.attention.landmark import LANDMARK
from hf_attn.checkpoints.from_base import FromBaseMixin
from hf_attn.hub import HubModelMixin

from .cache import LandmarkCache
from .configuration_landmark import LandmarkConfig
from .insertion import LANDMARK_TOKEN, Insertion, add_landmark_token
from .memory import MemoryStep, begin_step, rotate
from .retrieval import attend_to_memory


eager_attention_forward = LANDMARK.attention_function("landmark_eager")


def make_norm(config: LandmarkConfig) -> nn.Module:
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LandmarkPlainMLP(nn.Module):
    """Feed-forward block without a gate."""

    def __init__(self, config: LandmarkConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class LandmarkAttention(nn.Module):
    """Grouped-softmax attention to the input and to the memory."""

    def __init__(self, config: LandmarkConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_size, key_value_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        is_landmark: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: MemoryStep | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: `(batch, sequence, hidden_size)`, normalised.
            position_embeddings: cosines and sines of the rotary embedding.
            is_landmark: boolean `(batch, keys)`.
            attention_mask: mask over all keys.
            memory: what is common to all layers in reading and filling the cache.

        Returns:
            Output `(batch, sequence, hidden_size)` and weights, if they were computed. With retrieval the weights are those
            of the retrieved blocks, of the block that is being filled, and of the input, in this order.
        """
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        tables = tuple(table.unsqueeze(1) for table in position_embeddings)
        rotated_query, rotated_key = (rotate(states, tables) for states in (query_states, key_states))

        if memory is not None and memory.retrieval is not None:
            attn_output, attn_weights = attend_to_memory(
                memory,
                self.layer_idx,
                rotated_query,
                rotated_key,
                value_states,
                is_landmark,
                self.scaling,
                output_weights=bool(kwargs.get("output_attentions")),
            )
        else:
            all_keys, all_values = rotated_key, value_states
            if memory is not None and memory.past_length > 0:
                past_keys, past_values = memory.past(self.layer_idx)
                all_keys = torch.cat([past_keys, rotated_key], dim=2)
                all_values = torch.cat([past_values, value_states], dim=2)
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            attn_output, attn_weights = attention_interface(
                self,
                rotated_query,
                all_keys,
                all_values,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                is_landmark=is_landmark,
                **kwargs,
            )
        if memory is not None:
            memory.store(self.layer_idx, key_states, value_states)
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class LandmarkDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LandmarkConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LandmarkAttention(config, layer_idx)
        self.mlp = LlamaMLP(config) if config.gated_mlp else LandmarkPlainMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LandmarkPreTrainedModel(HubModelMixin, OwnAttentionMixin, LlamaPreTrainedModel):
    config: LandmarkConfig
    attention_mechanism = LANDMARK
    _no_split_modules = ["LandmarkDecoderLayer"]
    _can_record_outputs = {"hidden_states": LandmarkDecoderLayer, "attentions": LandmarkAttention}
    # The memory is a cache of growing blocks, not one of a fixed size.
    _can_compile_fullgraph = False


class LandmarkModel(LandmarkPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: LandmarkConfig):
        # Not LlamaModel's, which would build its own layers first.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LandmarkDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = make_norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        is_landmark: torch.Tensor | None = None,
        insert_landmarks: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder. The arguments are those of transformers' `LlamaModel.forward`, and

        Args:
            past_key_values: a [`LandmarkCache`]. What is beyond its `max_chunk_length` is processed in pieces. With a filled
                cache `position_ids` are not looked at: it counts the tokens of each row.
            is_landmark: boolean `(batch, sequence)`, which tokens are landmarks; found by their id if not given. Needed only
                with `inputs_embeds`.
            insert_landmarks: the input has no landmarks; insert one after every `mem_freq` tokens of each row, padding not
                counted, and hide them: the last hidden state is that of the caller's tokens. For a token that completes a
                block it is that of the landmark, if landmarks were targets at training.

        Returns:
            `hidden_states` and `attentions`, if asked for, include inserted landmarks.

        Raises:
            ValueError: for a cache of another kind, model or batch size, landmarks in an input that they shall be inserted into,
                landmarks at other places than retrieval needs, padding inside a row, or a mask for pairs of tokens with a
                cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        if self.gradient_checkpointing and self.training:
            past_key_values = None
        if past_key_values is not None and not isinstance(past_key_values, LandmarkCache):
            raise ValueError(
                f"past_key_values must be a LandmarkCache, got {type(past_key_values).__name__}, which keeps no landmarks."
            )
        if is_landmark is None and input_ids is not None:
            is_landmark = input_ids == self.config.landmark_token_id
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if is_landmark is None:
            is_landmark = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)

        pairwise_mask = attention_mask is not None and attention_mask.dim() == 4
        if pairwise_mask and (past_key_values is not None or insert_landmarks):
            raise ValueError("A mask for pairs of tokens goes neither with a LandmarkCache nor with insert_landmarks.")
        if past_key_values is None and use_cache and not pairwise_mask:
            past_key_values = LandmarkCache(self.config)
        cache = past_key_values
        num_columns = inputs_embeds.shape[1]
        if cache is not None:
            cache.start(self.config, inputs_embeds.shape[0], inputs_embeds.device, insert_landmarks)

        valid = self._valid_tokens(attention_mask, inputs_embeds, cache)
        insertion = None
        if insert_landmarks:
            if is_landmark.any():
                raise ValueError(
                    f"The input holds landmarks (token {self.config.landmark_token_id}) already, and insert_landmarks=True "
                    "(as in `generate`) shall insert them. Remove them."
                )
            if self.config.landmark_token_id >= len(self.embed_tokens.weight):
                raise ValueError(
                    f"landmark_token_id ({self.config.landmark_token_id}) is not in the vocabulary of "
                    f"{len(self.embed_tokens.weight)} tokens: it was cut off when the embeddings were resized."
                )
            seen = None if cache is None else cache.regular_tokens()
            insertion = Insertion.of(valid, self.config.mem_freq, seen)
            landmark = self.embed_tokens.weight[self.config.landmark_token_id]
            inputs_embeds = insertion.apply(inputs_embeds, landmark)
            valid, is_landmark = insertion.valid, insertion.is_landmark
            attention_mask, position_ids = None if valid.all() else valid.long(), None

        length = inputs_embeds.shape[1]
        chunk = length if cache is None or cache.max_chunk_length is None else cache.max_chunk_length
        if chunk < length and kwargs.get("output_attentions"):
            raise ValueError(
                f"The input ({length} tokens) is processed in pieces of {chunk}, and their attention weights are over "
                "different keys. Ask for them with a larger max_chunk_length or in pieces of your own."
            )
        outputs = []
        for start in range(0, length, chunk) if length else ():
            piece = slice(start, start + chunk)
            outputs.append(
                self._forward_piece(
                    inputs_embeds[:, piece],
                    attention_mask=attention_mask if chunk >= length else None,
                    position_ids=position_ids if chunk >= length else None,
                    valid=valid[:, piece],
                    is_landmark=is_landmark[:, piece],
                    cache=cache,
                    **kwargs,
                )
            )
        output = outputs[0] if len(outputs) == 1 else _joined(outputs)
        if insertion is not None:
            output.last_hidden_state = insertion.read(output.last_hidden_state, self.config.include_landmark_in_loss)
        if cache is not None:
            cache.seen_tokens += num_columns
            output.past_key_values = cache
        return output if return_dict else output.to_tuple()

    def _valid_tokens(
        self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, cache: LandmarkCache | None
    ) -> torch.Tensor:
        """Which tokens of the input are no padding, `(batch, sequence)`."""
        batch, length = inputs_embeds.shape[:2]
        if attention_mask is None or attention_mask.dim() == 4:
            return torch.ones(batch, length, dtype=torch.bool, device=inputs_embeds.device)
        seen = 0 if cache is None else cache.seen_tokens
        if attention_mask.shape[1] not in (length, seen + length):
            raise ValueError(
                f"attention_mask must cover the {length} tokens of the input, or those and the {seen} in the cache, got "
                f"{attention_mask.shape[1]}."
            )
        valid = attention_mask[:, attention_mask.shape[1] - length :].bool()
        changes = (valid[:, 1:] != valid[:, :-1]).sum(-1)
        if (changes > 2).any() or ((changes == 2) & valid[:, 0]).any():
            raise ValueError(
                "attention_mask has padding inside a row; padding may be at its beginning and at its end."
            )
        return valid

    @capture_outputs
    def _forward_piece(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        valid: torch.Tensor,
        is_landmark: torch.Tensor,
        cache: LandmarkCache | None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        memory = None
        if cache is not None:
            memory = begin_step(cache, valid, is_landmark, self.rotary_emb, inputs_embeds)
        # Positions count the tokens of a row, as the memory does.
        if position_ids is None or (memory is not None and not memory.is_first):
            position_ids = valid.cumsum(-1).clamp(min=1) - 1
            if memory is not None:
                position_ids = position_ids + memory.lengths[:, None]

        if memory is not None:
            mask, keys_are_landmarks = memory.mask, memory.is_landmark
        else:
            keys_are_landmarks = is_landmark
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=None,
                position_ids=position_ids,
            )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                is_landmark=keys_are_landmarks,
                attention_mask=mask,
                memory=memory,
                **kwargs,
            )
        if cache is not None:
            cache.append_tokens(valid, is_landmark)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


def _joined(outputs: list[BaseModelOutputWithPast]) -> BaseModelOutputWithPast:
    """The outputs of consecutive pieces of an input as one."""
    joined = BaseModelOutputWithPast(last_hidden_state=torch.cat([o.last_hidden_state for o in outputs], dim=1))
    if outputs[0].hidden_states is not None:
        joined.hidden_states = tuple(
            torch.cat(states, dim=1) for states in zip(*(o.hidden_states for o in outputs), strict=True)
        )
    return joined


class LandmarkForCausalLM(FromBaseMixin, LandmarkPreTrainedModel, LlamaForCausalLM):
    """The decoder with a language modelling head; `from_base` makes one from a Llama-like model.

    `forward` takes inputs that hold landmarks, as they are at training, or inserts them (`insert_landmarks=True`, see
    [`LandmarkModel`]); `generate` always inserts and hides them.
    """

    def __init__(self, config: LandmarkConfig):
        # Not LlamaForCausalLM's, which would build a Llama first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LandmarkModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """Inputs of a step of `generate`: plain tokens, between which the model inserts landmarks."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, "insert_landmarks": True}

    def generate(
        self,
        *args,
        cache_top_k: int | None = None,
        retrieval: str = "per_token_and_head",
        max_chunk_length: int | None = None,
        offload_cache_to_cpu: bool = False,
        max_blocks: int | None = None,
        record_retrieved: bool = False,
        **kwargs,
    ):
        """Generate from plain tokens; landmarks are inserted, hidden and never generated.

        Args:
            args, kwargs: as of transformers' `generate`.
            cache_top_k, retrieval, max_chunk_length, offload_cache_to_cpu, max_blocks, record_retrieved: the memory, see
                [`LandmarkCache`]. With `return_dict_in_generate=True` it is `past_key_values` of the output, and
                `past_key_values.retrieved_blocks` tells which blocks were read. To continue, pass it as `past_key_values`.

        Raises:
            ValueError: for a prompt with landmarks, or options that contradict each other.
        """
        memory = {
            "top_k": cache_top_k,
            "retrieval": retrieval,
            "max_chunk_length": max_chunk_length,
            "offload_to_cpu": offload_cache_to_cpu,
            "max_blocks": max_blocks,
            "record_retrieved": record_retrieved,
        }
        generation_config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        generation_config = generation_config or self.generation_config

        def option(name: str):
            return kwargs[name] if kwargs.get(name) is not None else getattr(generation_config, name, None)

        if option("cache_implementation") is not None:
            raise ValueError(
                f"cache_implementation={option('cache_implementation')!r} is no memory with landmarks; leave it out."
            )
        if kwargs.get("past_key_values") is None and option("use_cache") is not False:
            kwargs["past_key_values"] = LandmarkCache(self.config, **memory)
        elif any(memory[name] for name in memory if name != "retrieval"):
            raise ValueError(
                "The options of the memory have no effect with use_cache=False or with past_key_values, which has its own."
            )
        kwargs["suppress_tokens"] = [*(option("suppress_tokens") or ()), self.config.landmark_token_id]
        return super().generate(*args, **kwargs)

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> "LandmarkForCausalLM":
        """Make a model from a Llama, Mistral, Qwen2 or Qwen3 model. Without landmarks in the input its logits are the base's.

        The landmark token gets an embedding and an output row of its own, the means of the old rows.

        Args:
            base: a model, a Hub id or a folder.
            tokenizer: its tokenizer, to which the landmark token is added. Without it the landmark token is one after the
                last of the base's vocabulary; [`add_landmark_token`] then adds it to a tokenizer of that size.
            kwargs: `dtype`, and fields of [`LandmarkConfig`] to set differently, such as `mem_freq`.

        Raises:
            ValueError: if the base is of another architecture or has sliding windows.
        """
        if "landmark_token_id" in kwargs or "vocab_size" in kwargs:
            raise ValueError("from_base adds the landmark token itself; leave landmark_token_id and vocab_size out.")
        model = super().from_base(base, **kwargs)
        model._add_landmark_rows(model.config.vocab_size if tokenizer is None else add_landmark_token(tokenizer))
        return model

    def _add_landmark_rows(self, token_id: int) -> None:
        """Make `token_id` the landmark token, with the means of the rows before it as embedding and output row; the
        vocabulary grows if it is too small."""
        old = self.config.vocab_size
        tables = {"model.embed_tokens.weight": self.get_input_embeddings().weight}
        if not self.config.tie_word_embeddings:
            tables["lm_head.weight"] = self.get_output_embeddings().weight
        means = {name: table.detach()[:token_id].float().mean(0) for name, table in tables.items()}
        self.config.landmark_token_id = token_id
        if token_id >= old:
            self.resize_token_embeddings(token_id + 1, mean_resizing=False)
        with torch.no_grad():
            for name, mean in means.items():
                table = self.get_parameter(name)
                table[old:] = mean.to(table.dtype)
                table[token_id] = mean.to(table.dtype)
        self.base_report = replace(
            self.base_report,
            new=tuple(f"{name}[{token_id}]" for name in tables),
            new_parameters=self.num_parameters() - self.base_report.kept_parameters,
        )

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> LandmarkConfig:
        """Configuration for a base of type Llama, Mistral, Qwen2 or Qwen3.

        Raises:
            ValueError: for another architecture, or for one with sliding windows.
        """
        if base_config.model_type not in BASES:
            raise ValueError(
                f"A landmark model cannot be made from a {base_config.model_type!r} model. Supported bases: "
                f"{', '.join(BASES)}."
            )
        windows = "sliding_attention" in (getattr(base_config, "layer_types", None) or ())
        if windows or (base_config.model_type == "mistral" and base_config.sliding_window is not None):
            raise ValueError(
                f"The base has sliding windows ({base_config.sliding_window} tokens); landmark attention needs a base that "
                "attends to everything."
            )
        fields = LandmarkConfig.__dataclass_fields__
        values = {name: value for name, value in base_config.to_dict().items() if name in fields}
        for name in ("architectures", "model_type", "transformers_version"):
            values.pop(name, None)
        return LandmarkConfig(**{**values, **BASES[base_config.model_type], **overrides})


#: model type of a base -> fields in which its layers differ from Llama's
BASES = {
    "llama": {},
    "mistral": {"attention_bias": False},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True},
}


__all__ = [
    "LANDMARK_TOKEN",
    "LandmarkCache",
    "LandmarkForCausalLM",
    "LandmarkModel",
    "LandmarkPreTrainedModel",
    "add_landmark_token",
]
