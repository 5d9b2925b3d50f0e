# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Landmark attention (arXiv 2305.16300): a Llama-like model with random-access memory.

A landmark token closes every block of the text, and a token attends to the tokens of an earlier block through the weight
that it gives to the block's landmark. At inference it therefore needs to read only the few blocks whose landmarks it scores
highest, for texts of any length.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.architectures.decoder import (
    CACHE,
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    FromLlamaMixin,
    takes_cache,
)
from hf_attn.attention.family import OwnAttentionMixin
from hf_attn.attention.landmark import LANDMARK
from hf_attn.kernels.landmark.call import landmark_block_size

from .cache import LandmarkCache
from .configuration_landmark import LandmarkConfig
from .data import LandmarkDataCollator
from .insertion import LANDMARK_TOKEN, Insertion, add_landmark_token
from .memory import MemoryStep, begin_step, rotate
from .retrieval import attend_to_memory


class LandmarkAttention(DecoderAttention):
    """Grouped-softmax attention to the input and to the memory."""

    eager_attention_forward = staticmethod(LANDMARK.attention_function("landmark_eager"))

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
            memory: values shared by all layers for reading and filling the cache.

        Returns:
            Output `(batch, sequence, hidden_size)` and weights, if they were computed. With retrieval the weights are those
            of the retrieved blocks, of the block that is being filled, and of the input, in this order.
        """
        query_states, key_states = self.queries_and_keys(hidden_states, None)
        value_states = self.values(hidden_states)
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
            attn_output, attn_weights = self.attend(
                rotated_query, all_keys, all_values, attention_mask, is_landmark=is_landmark, **kwargs
            )
        if memory is not None:
            memory.store(self.layer_idx, key_states, value_states)
        return self.output(attn_output), attn_weights


class LandmarkDecoderLayer(DecoderLayer):
    def make_mixer(self, config: LandmarkConfig, layer_idx: int) -> LandmarkAttention:
        return LandmarkAttention(config, layer_idx)


class LandmarkPreTrainedModel(OwnAttentionMixin, DecoderPreTrainedModel):
    config: LandmarkConfig
    attention_mechanism = LANDMARK
    layer_class = LandmarkDecoderLayer
    # The memory is a cache of growing blocks, not one of a fixed size.
    _can_compile_fullgraph = False


class LandmarkModel(LandmarkPreTrainedModel, DecoderModel):
    """The decoder without a head."""

    @merge_with_config_defaults
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: LandmarkCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        is_landmark: torch.Tensor | None = None,
        insert_landmarks: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder. The arguments are those of transformers' `LlamaModel.forward`, and

        Args:
            position_ids: with a cache, or where landmarks are inserted, the model counts the tokens of each row, and these
                are not needed; others are refused.
            cache: a [`LandmarkCache`]. Inputs longer than its `max_chunk_length` are processed in chunks.
            is_landmark: boolean `(batch, sequence)`, which tokens are landmarks; found by their id if not given. Needed only
                with `inputs_embeds`.
            insert_landmarks: the input has no landmarks; insert one after every `mem_freq` tokens of each row, padding not
                counted, and hide them: the last hidden state is that of the caller's tokens. For a token that completes a
                block it is that of the landmark, if landmarks were targets at training.

        Returns:
            `hidden_states` and `attentions`, on request, include inserted landmarks.

        Raises:
            ValueError: for a cache of another kind, model or batch size, landmarks in an input with `insert_landmarks=True`,
                landmarks at other places than retrieval needs, padding inside a row, a mask for pairs of tokens with a cache,
                or positions that the model cannot use.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        if self.gradient_checkpointing and self.training:
            cache = None
        if cache is not None and not isinstance(cache, LandmarkCache):
            raise ValueError(
                f"{CACHE} must be a LandmarkCache, got {type(cache).__name__}, which does not store landmarks."
            )
        if is_landmark is None and input_ids is not None:
            is_landmark = input_ids == self.config.landmark_token_id
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if is_landmark is None:
            is_landmark = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)

        pairwise_mask = attention_mask is not None and attention_mask.dim() == 4
        if pairwise_mask and (cache is not None or insert_landmarks):
            raise ValueError("A mask of token pairs is not supported with a LandmarkCache or with insert_landmarks.")
        if cache is None and use_cache and not pairwise_mask:
            cache = LandmarkCache(self.config)
        num_columns = inputs_embeds.shape[1]
        if cache is not None:
            cache.start(self.config, inputs_embeds.shape[0], inputs_embeds.device, insert_landmarks)

        valid = self._valid_tokens(attention_mask, inputs_embeds, cache)
        if position_ids is not None and (cache is not None or insert_landmarks):
            _check_positions(position_ids, valid, cache, insert_landmarks)
        insertion = None
        if insert_landmarks:
            if is_landmark.any():
                raise ValueError(
                    f"The input already contains landmarks (token {self.config.landmark_token_id}), which "
                    "insert_landmarks=True (the default of `generate`) would insert. Remove them."
                )
            if self.config.landmark_token_id >= len(self.embed_tokens.weight):
                raise ValueError(
                    f"landmark_token_id ({self.config.landmark_token_id}) is not in the vocabulary of "
                    f"{len(self.embed_tokens.weight)} tokens: it was removed when the embeddings were resized."
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
                f"The input ({length} tokens) is processed in chunks of {chunk}, whose attention weights are over "
                "different keys. To get attention weights, use a larger max_chunk_length, or pass the input in "
                "several chunks."
            )
        outputs, is_one_piece = [], chunk >= length
        for start in (0,) if is_one_piece else range(0, length, chunk):
            piece = slice(start, None if is_one_piece else start + chunk)
            outputs.append(
                self._forward_piece(
                    inputs_embeds[:, piece],
                    attention_mask=attention_mask if is_one_piece else None,
                    position_ids=position_ids if is_one_piece else None,
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
            output[CACHE] = cache
        return output if return_dict else output.to_tuple()

    def _valid_tokens(
        self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, cache: LandmarkCache | None
    ) -> torch.Tensor:
        """Which tokens of the input are not padding, `(batch, sequence)`."""
        batch, length = inputs_embeds.shape[:2]
        if attention_mask is None or attention_mask.dim() == 4:
            return torch.ones(batch, length, dtype=torch.bool, device=inputs_embeds.device)
        seen = 0 if cache is None else cache.seen_tokens
        if attention_mask.shape[1] not in (length, seen + length):
            raise ValueError(
                f"attention_mask must cover the {length} tokens of the input, with or without the {seen} tokens in "
                f"the cache; got {attention_mask.shape[1]}."
            )
        valid = attention_mask[:, attention_mask.shape[1] - length :].bool()
        if torch.compiler.is_exporting():
            # An exported graph cannot depend on what the mask says.
            return valid
        changes = (valid[:, 1:] != valid[:, :-1]).sum(-1)
        if (changes > 2).any() or ((changes == 2) & valid[:, 0]).any():
            raise ValueError(
                "attention_mask has padding within a row; padding is supported only at the beginning and at the end."
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
                position_ids=position_ids,
                **{CACHE: None},
            )

        # Found out once for all layers: it waits for the device.
        block_size = None
        if not torch.compiler.is_compiling():
            block_size = landmark_block_size(keys_are_landmarks, keys_are_landmarks.shape[1])
        hidden_states = self.run_layers(
            self.layers[: self.config.num_hidden_layers],
            inputs_embeds,
            {"full_attention": mask},
            is_landmark=keys_are_landmarks,
            landmark_block_size=block_size,
            memory=memory,
            **self.layer_arguments(inputs_embeds, position_ids, None),
            **kwargs,
        )
        if cache is not None:
            cache.append_tokens(valid, is_landmark)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


def _check_positions(
    position_ids: torch.Tensor, valid: torch.Tensor, cache: LandmarkCache | None, insert_landmarks: bool
) -> None:
    """Check that the caller's positions are those that the model counts; before the first input they may be shifted, which
    changes nothing.

    Args:
        position_ids: `(batch or 1, length)`, of the caller's tokens.
        valid: `(batch, length)`.

    Raises:
        ValueError: if they are others.
    """
    counted = valid.cumsum(-1) - 1
    is_first = cache is None or cache.seen_tokens == 0
    if not is_first:
        counted = counted + (cache.regular_tokens() if insert_landmarks else cache.lengths)[:, None]
    shift = position_ids.to(counted.device) - counted
    first = valid.long().argmax(-1, keepdim=True)
    expected = shift.gather(1, first) if is_first else torch.zeros_like(shift)
    if bool(((shift != expected) & valid).any()):
        raise ValueError(
            "position_ids do not count the tokens from the end of the cache on. With inserted landmarks or a memory, "
            "positions count the tokens of each row without padding: leave position_ids out, and use one row per "
            "sequence."
        )


def _joined(outputs: list[BaseModelOutputWithPast]) -> BaseModelOutputWithPast:
    """The outputs of consecutive pieces of an input as one."""
    joined = BaseModelOutputWithPast(last_hidden_state=torch.cat([o.last_hidden_state for o in outputs], dim=1))
    if outputs[0].hidden_states is not None:
        joined.hidden_states = tuple(
            torch.cat(states, dim=1) for states in zip(*(o.hidden_states for o in outputs), strict=True)
        )
    return joined


class LandmarkForCausalLM(FromLlamaMixin, LandmarkPreTrainedModel, DecoderForCausalLM):
    """The decoder with a language modelling head; `from_base` makes one from a Llama-like model.

    `forward` takes inputs that hold landmarks, as they are at training, or inserts them (`insert_landmarks=True`, see
    [`LandmarkModel`]); `generate` always inserts and hides them.
    """

    model_class = LandmarkModel
    takes_sliding_windows = False

    def prepare_training_batch(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Insert landmarks into a batch of plain sequences; see [`LandmarkDataCollator`]."""
        rows = ({"input_ids": ids, "labels": row} for ids, row in zip(input_ids, labels, strict=True))
        return LandmarkDataCollator(self.config)(list(rows))

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """Inputs of a step of `generate`: plain tokens, between which the model inserts landmarks."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, "insert_landmarks": True}

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                # It calls the model itself, with the prompt left out and a memory of its own.
                processor.model = partial(self, insert_landmarks=True)
                memory = (kwargs.get("model_kwargs") or {}).get(CACHE)
                if isinstance(memory, LandmarkCache):
                    processor.unconditional_context[CACHE] = memory.new(self.config)
        return processors

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
                `past_key_values.retrieved_blocks` contains the retrieved blocks. To continue, pass it as `past_key_values`.

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
                f"cache_implementation={option('cache_implementation')!r} is not supported with landmarks; leave it "
                "out."
            )
        if "past_key_values" in kwargs:
            kwargs[CACHE] = kwargs.pop("past_key_values")
        if kwargs.get(CACHE) is None and option("use_cache") is not False:
            kwargs[CACHE] = LandmarkCache(self.config, **memory)
        elif any(memory[name] for name in memory if name != "retrieval"):
            raise ValueError(
                "The options of the memory have no effect with use_cache=False, or with past_key_values, which has "
                "its own options."
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


__all__ = [
    "LANDMARK_TOKEN",
    "LandmarkCache",
    "LandmarkForCausalLM",
    "LandmarkModel",
    "LandmarkPreTrainedModel",
    "add_landmark_token",
]
