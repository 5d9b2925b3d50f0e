# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Classification of speech and its transcript with context-aware attention and optimal transport (arXiv 2305.16406)."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from hf_attn.hub import HubModelMixin

from .configuration_dementia_fusion import DementiaFusionConfig
from .layers import ModalityInteraction, StreamClassifier


@dataclass
class DementiaFusionModelOutput(ModelOutput):
    """Output of the interaction of both modalities.

    Attributes:
        streams: `(batch, streams, hidden_size)`: text, image, text mapped to the image, image mapped to the text.
        text_to_image_plan: `(batch, text length, image length)`, transported mass from each token to each part of the spectrogram.
        image_to_text_plan: `(batch, image length, text length)`.
        text_hidden_states: with `output_hidden_states`, states of the layers of the text encoder, the last one after its norm.
        image_hidden_states: the same of the image encoder, without the distillation token.
        attentions: with eager attention and `output_attentions`, the weights of the layers that attend within text and image,
            `(batch, heads, length, length)` each.
    """

    streams: torch.FloatTensor | None = None
    text_to_image_plan: torch.FloatTensor | None = None
    image_to_text_plan: torch.FloatTensor | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, torch.FloatTensor] | None = None


@dataclass
class DementiaFusionClassifierOutput(ModelOutput):
    """Logits, and the inputs of the classifier; see [`DementiaFusionModelOutput`].

    Attributes:
        loss: label-smoothed cross entropy.
        logits: `(batch, num_labels)`.
        fusion_weights: `(batch, streams)`, share of each stream, with attention fusion.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    fusion_weights: torch.FloatTensor | None = None
    streams: torch.FloatTensor | None = None
    text_to_image_plan: torch.FloatTensor | None = None
    image_to_text_plan: torch.FloatTensor | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, torch.FloatTensor] | None = None


def _without_pooler(model_class: type) -> dict[str, bool]:
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}


def _new_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModel.from_config(config, **_without_pooler(MODEL_MAPPING[type(config)]))


def _load_encoder(encoder: str | Path | PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    if isinstance(encoder, PreTrainedModel):
        return encoder
    model_class = MODEL_MAPPING[type(AutoConfig.from_pretrained(encoder))]
    return AutoModel.from_pretrained(encoder, dtype=dtype, **_without_pooler(model_class))


class DementiaFusionPreTrainedModel(HubModelMixin, PreTrainedModel):
    """What both models share."""

    config: DementiaFusionConfig
    base_model_prefix = "dementia_fusion"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ContextAttention", "GateAttention"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_attention_backend = True

    def save_pretrained(self, save_directory: str | Path, *args, save_original_format: bool = False, **kwargs) -> None:
        """Save the model; see transformers' `PreTrainedModel.save_pretrained`.

        The encoders' tensors keep the names that they have in the model. transformers would write those of DeiT and others under older
        names, and `Trainer`, which loads checkpoints into an existing model, does not translate them back.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class DementiaFusionModel(DementiaFusionPreTrainedModel):
    """Encoders of transcript and spectrogram, attention within each, and transport between them.

    Args:
        config: configuration.
        text_model: encoder to use in the place of a new one.
        vision_model: the same for spectrograms.
    """

    def __init__(
        self,
        config: DementiaFusionConfig,
        text_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.text_model = text_model if text_model is not None else _new_encoder(config.text_config)
        self.vision_model = vision_model if vision_model is not None else _new_encoder(config.vision_config)
        self.interaction = ModalityInteraction(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DementiaFusionModelOutput:
        """Encode; see [`DementiaFusionForClassification.forward`] for the arguments."""
        self._check_inputs(input_ids, inputs_embeds, pixel_values)
        keep = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        want_attentions = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        deep = self.config.intra == "context" and self.config.context != "global"
        text_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if token_type_ids is not None:
            text_inputs["token_type_ids"] = token_type_ids
        text_states = self._states(self.text_model, keep or deep, **text_inputs)
        image_states = self._states(self.vision_model, keep or deep, pixel_values=pixel_values)
        if hasattr(getattr(self.vision_model, "embeddings", None), "distillation_token"):
            # The second token of DeiT is the distillation token, not a part of the image.
            image_states = tuple(torch.cat([states[:, :1], states[:, 2:]], dim=1) for states in image_states)
        found = self.interaction(text_states, image_states, attention_mask)
        return DementiaFusionModelOutput(
            streams=found.streams,
            text_to_image_plan=found.text_to_image_plan,
            image_to_text_plan=found.image_to_text_plan,
            text_hidden_states=text_states if keep else None,
            image_hidden_states=image_states if keep else None,
            attentions=found.attentions if want_attentions else None,
        )

    def _states(self, encoder: PreTrainedModel, all_layers: bool, **inputs) -> tuple[torch.Tensor, ...]:
        outputs = encoder(**inputs, output_hidden_states=all_layers, return_dict=True)
        # Of some encoders the last hidden state has a norm behind it that the last of `hidden_states` has not.
        return (*outputs.hidden_states[:-1], outputs.last_hidden_state) if all_layers else (outputs.last_hidden_state,)

    def _check_inputs(self, input_ids, inputs_embeds, pixel_values) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass the transcript either as input_ids or as inputs_embeds.")
        if pixel_values is None:
            raise ValueError("pixel_values (spectrograms) are missing; compute them with SpeechImageFeatureExtractor.")
        text = input_ids if input_ids is not None else inputs_embeds
        if len(text) == 0:
            raise ValueError("The batch is empty.")
        if len(text) != len(pixel_values):
            raise ValueError(f"Got {len(text)} transcripts but {len(pixel_values)} spectrograms.")
        longest = getattr(self.config.text_config, "max_position_embeddings", None)
        if longest is not None and text.shape[1] > longest:
            raise ValueError(
                f"The transcript has {text.shape[1]} tokens, but the text encoder supports at most {longest}; "
                "truncate it (truncation=True)."
            )


class DementiaFusionForClassification(DementiaFusionPreTrainedModel):
    """Classifies recordings of speech with their transcripts. Not a diagnostic device.

    Args:
        config: configuration.
        text_model: encoder to use instead of a new one; see [`from_text_vision_pretrained`].
        vision_model: the same for spectrograms.
    """

    # The loss is a mean over the batch, independent of the number of items.
    accepts_loss_kwargs = False

    def __init__(
        self,
        config: DementiaFusionConfig,
        text_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
    ):
        if config.num_labels < 2:
            raise ValueError(f"A classifier needs at least two classes, got num_labels={config.num_labels}.")
        super().__init__(config)
        self.dementia_fusion = DementiaFusionModel(config, text_model, vision_model)
        self.head = StreamClassifier(config)
        self.post_init()

    @classmethod
    def from_text_vision_pretrained(
        cls,
        text: str | Path | PreTrainedModel,
        vision: str | Path | PreTrainedModel,
        *,
        dtype: torch.dtype | None = torch.float32,
        **config_fields,
    ) -> "DementiaFusionForClassification":
        """Make a model from pretrained encoders, with new layers after them.

            model = DementiaFusionForClassification.from_text_vision_pretrained(
                "google-bert/bert-base-uncased", "facebook/deit-base-patch16-224", context="deep", cross="emd"
            )

        Args:
            text: BERT-like encoder: Hub id, folder or model.
            vision: ViT- or DeiT-like encoder of the same width.
            dtype: dtype of the encoders that are loaded; `None` for that of their files.
            config_fields: fields of [`DementiaFusionConfig`], and `id2label` or `num_labels`.

        Raises:
            ValueError: for encoders of different width, and unknown fields.
        """
        known = {field.name for field in fields(DementiaFusionConfig)} | {"num_labels"}
        unknown = sorted(set(config_fields) - known)
        if unknown:
            raise ValueError(f"DementiaFusionConfig has no field {', '.join(unknown)}.")
        text_model, vision_model = (_load_encoder(encoder, dtype) for encoder in (text, vision))
        config = DementiaFusionConfig(
            text_config=text_model.config, vision_config=vision_model.config, **config_fields
        )
        return cls(config, text_model, vision_model).eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DementiaFusionClassifierOutput:
        """Classify.

        Args:
            input_ids: `(batch, text length)`, tokens of the transcripts.
            pixel_values: `(batch, 3, height, width)`, log-Mel spectrograms with their delta and delta-delta.
            attention_mask: `(batch, text length)`, 0 where there is padding.
            token_type_ids: `(batch, text length)`, for text encoders that have them.
            inputs_embeds: `(batch, text length, hidden_size)`, instead of `input_ids`.
            labels: `(batch,)`.
            output_hidden_states: return the states of the layers of both encoders.
            output_attentions: return the attention weights within each modality, with eager attention.
        """
        outputs = self.dementia_fusion(
            input_ids,
            pixel_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits, fusion_weights, loss = self.head(outputs.streams, labels)
        return DementiaFusionClassifierOutput(loss=loss, logits=logits, fusion_weights=fusion_weights, **outputs)


__all__ = ["DementiaFusionForClassification", "DementiaFusionModel", "DementiaFusionPreTrainedModel"]
