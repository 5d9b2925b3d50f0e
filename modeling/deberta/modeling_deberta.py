# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""DeBERTa (arXiv 2006.03654) with its enhanced mask decoder, which fills masks as the official code does."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Embeddings,
    DebertaV2Model,
    DebertaV2PreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from hf_attn.hub import HubModelMixin
from hf_attn.patching.deberta.attention import FastDebertaV2Encoder, FastDebertaV2SelfAttention

from .configuration_deberta import DebertaEMDConfig


#: attn_implementation -> implementation of the disentangled attention
_IMPLEMENTATIONS = {"eager": "eager", "sdpa": "auto", "flex_attention": "flex"}


class DebertaEMDSelfAttention(FastDebertaV2SelfAttention):
    """Disentangled attention, computed as `attn_implementation` says."""

    def __init__(self, config: DebertaEMDConfig):
        super().__init__(config)
        self.config = config
        self.make_fast(hf_compat=False)

    @property
    def implementation(self) -> str:
        name = self.config._attn_implementation
        if name not in _IMPLEMENTATIONS:
            raise ValueError(f"attn_implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got {name!r}.")
        return _IMPLEMENTATIONS[name]


class DebertaEMDEncoder(FastDebertaV2Encoder):
    def __init__(self, config: DebertaEMDConfig):
        super().__init__(config)
        self.config = config
        for layer in self.layer:
            layer.attention.self = DebertaEMDSelfAttention(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        num_layers: int | None = None,
    ) -> BaseModelOutput:
        """Encode.

        Args:
            hidden_states: embeddings, `(batch, length, hidden_size)`.
            attention_mask: `(batch, length)`, or `(batch, length, length)` for pairs.
            output_hidden_states: return the states of all layers.
            output_attentions: return the attention weights.
            num_layers: how many layers to run; all if not given.
        """
        embeddings = hidden_states
        token_mask = (
            attention_mask if attention_mask.ndim == 2 else (attention_mask.sum(-2) > 0).to(attention_mask.dtype)
        )
        mask = self.get_attention_mask(attention_mask)
        table = self.get_rel_embedding()
        all_hidden_states, all_attentions = [hidden_states], []
        for index, layer in enumerate(
            self.layer[: self.config.num_hidden_layers if num_layers is None else num_layers]
        ):
            # By position: reentrant checkpointing follows gradients of positional arguments only.
            hidden_states, weights = layer(hidden_states, mask, None, None, table, output_attentions)
            if index == 0 and self.conv is not None:
                hidden_states = self.conv(embeddings, hidden_states, token_mask)
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class DebertaEMDPreTrainedModel(HubModelMixin, DebertaV2PreTrainedModel):
    config: DebertaEMDConfig
    _no_split_modules = ["DebertaV2Embeddings", "DebertaV2Layer"]
    _keys_to_ignore_on_load_unexpected = None
    _supports_sdpa = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DebertaLMPredictionHead):
            init.zeros_(module.bias)


class DebertaEMDModel(DebertaEMDPreTrainedModel, DebertaV2Model):
    """The encoder without a head."""

    # Parameters of the mask decoder.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_embeddings", r"lm_predictions"]

    def __init__(self, config: DebertaEMDConfig):
        # Not DebertaV2Model's, which would build its own encoder first.
        DebertaV2PreTrainedModel.__init__(self, config)
        self.embeddings = DebertaV2Embeddings(config)
        self.encoder = DebertaEMDEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_layers: int | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode texts.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: 1 for tokens and 0 for padding, `(batch, length)`; all ones if not given.
            token_type_ids: `(batch, length)`, for models with `type_vocab_size`.
            position_ids: `(batch, length)`, for models with `position_biased_input`.
            inputs_embeds: `(batch, length, embedding_size)` in the place of input_ids.
            output_attentions: return the attention weights.
            output_hidden_states: return the states of all layers.
            num_layers: how many layers to run; all if not given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        given = input_ids if input_ids is not None else inputs_embeds
        if given.shape[1] == 0:
            raise ValueError("The texts of this batch have length 0; every text needs at least one token.")
        if input_ids is not None and len(input_ids):
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        limit = self.config.max_position_embeddings
        if self.config.position_biased_input and given.shape[1] > limit:
            raise ValueError(f"A text has {given.shape[1]} tokens, but there are only {limit} positions. Truncate it.")
        if attention_mask is None:
            attention_mask = torch.ones(given.shape[:2], device=given.device, dtype=torch.long)
        embeddings = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            mask=attention_mask if attention_mask.ndim == 2 else (attention_mask.sum(-2) > 0),
            inputs_embeds=inputs_embeds,
        )
        return self.encoder(
            embeddings,
            attention_mask,
            output_hidden_states=self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            num_layers=num_layers,
        )


class DebertaLMPredictionHead(nn.Module):
    """States to scores of the vocabulary, by the word embeddings; an own bias."""

    def __init__(self, config: DebertaEMDConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor, word_embeddings: nn.Embedding) -> torch.Tensor:
        hidden_states = self.LayerNorm(self.activation(self.dense(hidden_states)))
        return nn.functional.linear(hidden_states, word_embeddings.weight, self.bias)


class DebertaLMPredictions(nn.Module):
    """Holds the head under the name of the official checkpoints."""

    def __init__(self, config: DebertaEMDConfig):
        super().__init__()
        self.lm_head = DebertaLMPredictionHead(config)


@dataclass
class DebertaEMDMaskedLMOutput(MaskedLMOutput):
    """Output of [`DebertaEMDForMaskedLM`].

    Attributes:
        loss: mean cross entropy of the masked positions.
        logits: `(batch, length, vocab_size)`; of the chosen positions only, `(number of them, vocab_size)`, row by row, if
            labels or masked_positions were given.
        hidden_states: states of the embeddings and the ordinary layers.
        attentions: weights of the ordinary layers.
    """


class DebertaEMDForMaskedLM(DebertaEMDPreTrainedModel):
    """Masked language model with the enhanced mask decoder.

    With H the states before the last layer and z the absolute positions, the decoder is the last layer, used twice in the
    place of once:

        q_0 = z + H,    q_1 = LastLayer(query=q_0, key and value=H),    q_2 = LastLayer(query=q_1, key and value=H)

    A row of q_2 does not depend on other rows, so only the requested positions are decoded.
    """

    def __init__(self, config: DebertaEMDConfig):
        super().__init__(config)
        if not config.position_biased_input and config.embedding_size != config.hidden_size:
            raise ValueError(
                "The enhanced mask decoder adds position embeddings to hidden states: embedding_size "
                f"({config.embedding_size}) must equal hidden_size ({config.hidden_size}) unless "
                "position_biased_input is set."
            )
        self.deberta = DebertaEMDModel(config)
        if not config.position_biased_input:
            self.deberta.embeddings.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.embedding_size
            )
        self.lm_predictions = DebertaLMPredictions(config)
        self.post_init()

    def get_output_embeddings(self) -> None:
        """None: the word embeddings are used as they are."""

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`; the bias of the head grows by zeros."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        head = self.lm_predictions.lm_head
        bias = head.bias.new_zeros(embeddings.weight.shape[0])
        kept = min(len(bias), len(head.bias))
        bias[:kept] = head.bias.data[:kept]
        head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> DebertaEMDMaskedLMOutput:
        """Score the vocabulary.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: 1 for tokens and 0 for padding, `(batch, length)`.
            token_type_ids: `(batch, length)`, for models with `type_vocab_size`.
            position_ids: `(batch, length)`, for models with `position_biased_input`.
            inputs_embeds: `(batch, length, embedding_size)` in the place of input_ids.
            labels: original tokens at masked positions, -100 elsewhere, `(batch, length)`.
            masked_positions: boolean, positions to decode, `(batch, length)`. Those with a label if there are labels, else
                all, if not given.
            output_attentions: return the attention weights of the ordinary layers.
            output_hidden_states: return the states of the ordinary layers, of which the last is not decoded.
            kwargs: `num_items_in_batch` of Trainer.

        Raises:
            ValueError: if a text is longer than the table of absolute positions, or a label is not a token.
        """
        if labels is not None and masked_positions is None:
            masked_positions = labels != -100
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        last = self.config.num_hidden_layers - 1
        uses_decoder = not self.config.position_biased_input
        # The ordinary output of the last layer is not decoded.
        runs_last = output_hidden_states or output_attentions or not uses_decoder
        outputs = self.deberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states or runs_last,
            num_layers=None if runs_last else last,
            return_dict=True,
        )
        if uses_decoder:
            before_last = outputs.hidden_states[last] if runs_last else outputs.last_hidden_state
            decoded = self.decode(before_last, attention_mask, masked_positions)
        else:
            decoded = outputs.last_hidden_state
            decoded = decoded if masked_positions is None else decoded[masked_positions]
        logits = self.lm_predictions.lm_head(decoded, self.deberta.embeddings.word_embeddings)
        return DebertaEMDMaskedLMOutput(
            loss=None if labels is None else self._loss(logits, labels[masked_positions], **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def decode(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        output_steps: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The enhanced mask decoder without its head.

        Args:
            hidden_states: states before the last layer, `(batch, length, hidden_size)`.
            attention_mask: as of [`forward`].
            masked_positions: as of [`forward`].
            output_steps: return q_1 and q_2 instead of only q_2.

        Returns:
            `(batch, length, hidden_size)`, or with masked_positions `(number of positions, hidden_size)`, row by row.
        """
        length, limit = hidden_states.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"A text has {length} tokens, but the mask decoder has only {limit} positions "
                "(max_position_embeddings). Truncate it."
            )
        encoder = self.deberta.encoder
        layer, table = encoder.layer[-1], encoder.get_rel_embedding()
        mask = None if attention_mask is None else encoder.get_attention_mask(attention_mask)
        positions = torch.arange(length, device=hidden_states.device)
        query_states = self.deberta.embeddings.position_embeddings(positions) + hidden_states
        relative_pos, chosen = None, None
        if masked_positions is not None:
            masked_positions = masked_positions.bool()
            counts = masked_positions.sum(-1)
            # The chosen positions of each text, then others as filling, which is cut off in the end.
            order = torch.argsort(~masked_positions, dim=-1, stable=True)[:, : int(counts.max()) if len(counts) else 0]
            chosen = torch.arange(order.shape[1], device=order.device) < counts[:, None]
            rows = order[..., None]
            query_states = query_states.gather(1, rows.expand(-1, -1, query_states.shape[-1]))
            relative_pos = (
                layer.attention.self.buckets_of(rows - positions) if self.config.relative_attention else None
            )
            if mask is not None and mask.shape[2] > 1:
                mask = mask.gather(2, rows[:, None].expand(-1, -1, -1, length))
        steps = []
        for _ in range(2):
            if query_states.shape[1]:
                query_states = layer(hidden_states, mask, query_states, relative_pos, table)[0]
            steps.append(query_states if chosen is None else query_states[chosen])
        return tuple(steps) if output_steps else steps[-1]

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor, **kwargs) -> torch.Tensor:
        if not len(targets):
            return logits.sum()  # of nothing: zero, with gradients of zero
        wrong = targets[(targets < 0) | (targets >= self.config.vocab_size)]
        if len(wrong):
            raise ValueError(
                f"Label {int(wrong[0])} is not a token: labels must be between 0 and {self.config.vocab_size - 1}, or "
                "-100 for positions without prediction."
            )
        return self.loss_function(logits=logits, labels=targets, vocab_size=self.config.vocab_size, **kwargs)


__all__ = ["DebertaEMDConfig", "DebertaEMDForMaskedLM", "DebertaEMDModel"]
