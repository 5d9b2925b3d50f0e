# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Wide transformers (arXiv 2210.00640): encoders that trade layers for heads."""

import itertools
from copy import deepcopy

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from hf_attn.architectures.decoder import DecoderLayer, DecoderPreTrainedModel, PlainMLP
from hf_attn.architectures.encoder import EncoderModel

from .configuration_wide_attention import WideTransformerConfig
from .folding import MAX_TABLE, FoldedClassToken, refusal
from .mixers import LinformerAttention, PerformerAttention, SynthesizerAttention, make_mixer
from .patterns import draw_random_blocks, mask_function
from .positions import sinusoids


class WideTransformerMLP(PlainMLP):
    """Feed-forward block with dropout behind its activation."""

    def __init__(self, config: WideTransformerConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


class WideTransformerLayer(DecoderLayer):
    """Pre-norm layer with dropout on both branches."""

    def __init__(self, config: WideTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def make_mixer(self, config: WideTransformerConfig, layer_idx: int):
        return make_mixer(config, layer_idx)

    def make_mlp(self, config: WideTransformerConfig, layer_idx: int) -> nn.Module:
        return WideTransformerMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class ClassToken(nn.Module):
    """A learned token in front of each text."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        token = self.weight.to(inputs_embeds.dtype).expand(inputs_embeds.shape[0], 1, -1)
        return torch.cat([token, inputs_embeds], dim=1)


class WideTransformerPreTrainedModel(DecoderPreTrainedModel):
    """Base class of all wide transformers."""

    config: WideTransformerConfig
    layer_class = WideTransformerLayer
    # FlashAttention would ignore the patterns.
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LinformerAttention):
            init.xavier_uniform_(module.token_projection)
        elif isinstance(module, SynthesizerAttention):
            std = module.left_factor.shape[-1] ** -0.25
            init.normal_(module.left_factor, std=std)
            init.normal_(module.right_factor, std=std)
        elif isinstance(module, PerformerAttention):
            init.normal_(module.directions)
        elif isinstance(module, ClassToken):
            init.zeros_(module.weight)


class WideTransformerModel(WideTransformerPreTrainedModel, EncoderModel):
    """The encoder without a head. With `pooling="cls"` its first state is that of the class token."""

    def __init__(self, config: WideTransformerConfig):
        super().__init__(config)
        self.cls_token = ClassToken(config.hidden_size) if config.pooling == "cls" else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # No buffer, because the seed is saved; and not drawn in `forward`, because an exported graph would draw others.
        self.random_blocks = draw_random_blocks(config)
        self.post_init()

    def make_embedding(self, config: WideTransformerConfig) -> nn.Embedding:
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def make_rotary_embedding(self, config: WideTransformerConfig) -> None:
        return None

    def embed_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.dropout(inputs_embeds + sinusoids(position_ids, self.config.hidden_size, inputs_embeds.dtype))

    def mask_arguments(self, input_ids, attention_mask, past_length) -> dict:
        pattern = mask_function(self.config, attention_mask, self.random_blocks)
        return {} if pattern is None else {"and_mask_function": pattern}

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encode texts.

        Args:
            input_ids: `(batch, length)`; either these or `inputs_embeds` `(batch, length, hidden_size)`.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding. If it is not given, tokens with the id of padding
                are padding.

        Returns:
            States `(batch, length, hidden_size)` after the final norm, with one more in front for the class token if there is
            one.

        Raises:
            ValueError: if the batch or a text is empty, all padding or longer than `max_position_embeddings`, or the mask does not fit.
        """
        mask = self.check_inputs(input_ids, attention_mask, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.cls_token is not None:
            inputs_embeds = self.cls_token(inputs_embeds)
            # As in the benchmark, the class token is a key where the first token is one.
            mask = torch.cat([mask[:, :1], mask], dim=1)
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)

    def check_inputs(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Check the inputs of `forward`, and return which tokens are not padding, boolean `(batch, length)`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        given = inputs_embeds if input_ids is None else input_ids
        batch, length = given.shape[:2]
        if batch == 0:
            raise ValueError("The batch is empty.")
        if length == 0:
            raise ValueError("The texts have no tokens. Leave empty texts out, or use at least one token.")
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"The input has {length} tokens, but the model has "
                f"max_position_embeddings={self.config.max_position_embeddings}. Truncate it, for example with "
                "`truncation=True` in the tokenizer."
            )
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (batch, length):
                raise ValueError(
                    f"attention_mask must have the shape (batch, length) = {(batch, length)}, got "
                    f"{tuple(attention_mask.shape)}."
                )
            mask = attention_mask.bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        else:
            mask = torch.ones(batch, length, dtype=torch.bool, device=given.device)
        if not torch.compiler.is_compiling() and not bool(mask.any(-1).all()):
            rows = (~mask.any(-1)).nonzero().flatten().tolist()
            raise ValueError(
                f"All tokens are padding in rows {rows}. Leave empty texts out, or use at least one token."
            )
        return mask


def pool(hidden_states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """The state `(batch, hidden_size)` that is classified.

    Args:
        hidden_states: `(batch, length, hidden_size)`, with the class token in front if there is one.
        mask: `(batch, length)` without the class token, false for padding.
        pooling: as in the configuration.
    """
    if pooling == "cls":
        return hidden_states[:, 0]
    if pooling == "first":
        first = mask.int().argmax(-1)
        return hidden_states[torch.arange(len(first), device=first.device), first]
    weights = mask[..., None].to(hidden_states.dtype)
    return (hidden_states * weights).sum(1) / weights.sum(1)


class WideTransformerHead(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        sizes: width of the input, of the layers between, and of the output.
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = torch.relu(layer(hidden_states))
        return self.layers[-1](hidden_states)


class WideTransformerForSequenceClassification(WideTransformerPreTrainedModel):
    """The encoder with a classifier of texts."""

    accepts_loss_kwargs = False

    def __init__(self, config: WideTransformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = WideTransformerModel(config)
        self.classifier = WideTransformerHead([config.hidden_size, config.intermediate_size, config.num_labels])
        self._folded: FoldedClassToken | None = None
        self.post_init()

    def fold(self, table: bool | None = None) -> "WideTransformerForSequenceClassification":
        """Compute only the state of the class token, which gives the same logits and is much faster.

        The weights are not changed; the constants are recomputed when the weights change (but not if they are changed through
        `.data`: call `fold` again then). A call that requests hidden states or attention weights, needs gradients or
        comes in training is computed as before.

        Args:
            table: whether to keep a table of the scores of all tokens at all positions. By default it is made if it is not
                larger than 128 MiB, which a vocabulary of bytes never reaches at 1000 positions and 48 heads.

        Returns:
            The model itself.

        Raises:
            ValueError: if the model cannot be folded: it is in training, has several layers, classifies something else than
                a class token, or has another attention than softmax.
        """
        reason = refusal(self)
        if reason is not None:
            raise ValueError(f"This model cannot be folded: {reason}.")
        if table is None:
            config = self.config
            cells = (config.max_position_embeddings + 1) * (config.vocab_size + 1) * config.num_attention_heads
            table = 4 * cells <= MAX_TABLE
        self._folded = FoldedClassToken(self, table)
        return self

    def unfold(self) -> "WideTransformerForSequenceClassification":
        """Compute all states again.

        Returns:
            The model itself.
        """
        self._folded = None
        return self

    def _serves_folded(self, kwargs: dict) -> bool:
        recorded = ("output_attentions", "output_hidden_states")
        return (
            self._folded is not None
            and not torch.is_grad_enabled()
            and not any(kwargs.get(name) or getattr(self.config, name, False) for name in recorded)
            and refusal(self) is None
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            labels: `(batch,)`, classes, or values for regression.

        The other arguments are those of [`WideTransformerModel.forward`].
        """
        mask = self.model.check_inputs(input_ids, attention_mask, inputs_embeds)
        if self._serves_folded(kwargs):
            states, outputs = self._folded.state(self, input_ids, inputs_embeds, mask), BaseModelOutput()
        else:
            outputs = self.model(input_ids, attention_mask=mask, inputs_embeds=inputs_embeds, **kwargs)
            states = pool(outputs.last_hidden_state, mask, self.config.pooling)
        return _classified(self, self.classifier(states), labels, outputs)


class WideTransformerForDocumentMatching(WideTransformerPreTrainedModel):
    """The encoder with a classifier of pairs of texts, both encoded alike and without a class token."""

    accepts_loss_kwargs = False

    def __init__(self, config: WideTransformerConfig):
        if config.pooling == "cls":
            config = deepcopy(config)
            config.pooling = "first"
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_type = "ForSequenceClassification"
        self.model = WideTransformerModel(config)
        width = config.intermediate_size
        self.classifier = WideTransformerHead([2 * config.hidden_size, width, width // 2, config.num_labels])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        other_input_ids: torch.LongTensor | None = None,
        other_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify pairs of texts.

        Args:
            input_ids: `(batch, length)`, the first texts.
            attention_mask: `(batch, length)`; if it is not given, tokens with the id of padding are padding.
            other_input_ids: `(batch, other_length)`, the second texts.
            other_attention_mask: the same for them.
            labels: `(batch,)`, classes.

        Returns:
            Logits; states `(batch, 2, length, hidden_size)` and attention weights `(batch, 2, heads, length, length)` if they
            were requested, of first and second texts padded to the longest of both.

        Raises:
            ValueError: if a text is missing or one that [`WideTransformerModel.forward`] does not take.
        """
        if input_ids is None or other_input_ids is None:
            raise ValueError("Matching needs two texts: pass input_ids and other_input_ids.")
        if len(input_ids) != len(other_input_ids):
            raise ValueError(
                f"input_ids and other_input_ids must have the same batch size, got {len(input_ids)} and "
                f"{len(other_input_ids)}."
            )
        masks = (
            self.model.check_inputs(input_ids, attention_mask),
            self.model.check_inputs(other_input_ids, other_attention_mask),
        )
        length = max(input_ids.shape[1], other_input_ids.shape[1])

        def joined(tensors, value):
            return torch.cat(
                [nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors]
            )

        mask = joined(masks, False)
        ids = joined((input_ids, other_input_ids), self.config.pad_token_id or 0)
        outputs = self.model(ids, attention_mask=mask, **kwargs)
        states = pool(outputs.last_hidden_state, mask, self.config.pooling)
        for name in ("hidden_states", "attentions"):
            if outputs.get(name) is not None:
                outputs[name] = tuple(
                    None if tensor is None else torch.stack(tensor.chunk(2), dim=1) for tensor in outputs[name]
                )
        return _classified(self, self.classifier(torch.cat(states.chunk(2), dim=-1)), labels, outputs)


def _classified(model: nn.Module, logits: torch.Tensor, labels, outputs: BaseModelOutput) -> SequenceClassifierOutput:
    loss = None
    if labels is not None:
        _check_labels(labels, model.num_labels)
        loss = model.loss_function(labels=labels, pooled_logits=logits, config=model.config)
    return SequenceClassifierOutput(
        loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )


def _check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Check classes; other labels, for several classes at once or for regression, are floating-point numbers."""
    if num_labels == 1 or labels.is_floating_point() or torch.compiler.is_compiling():
        return
    wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
    if wrong.numel():
        raise ValueError(
            f"labels must be between 0 and {num_labels - 1}, got {sorted(set(wrong.tolist()))}. Set `num_labels` in "
            "the configuration to the number of classes."
        )


__all__ = [
    "WideTransformerForDocumentMatching",
    "WideTransformerForSequenceClassification",
    "WideTransformerModel",
]
