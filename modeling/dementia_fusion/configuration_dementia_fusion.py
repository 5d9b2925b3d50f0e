# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the audio and text classifier for dementia recognition."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_attn.architectures.ranges import POSITIVE, RATE, SIZE
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


#: ways in which a layer attends within a modality, kinds of context, ways of the gate, of the transport and of the fusion
CHOICES = {
    "intra": ("context", "gate"),
    "context": ("global", "deep", "deep-global"),
    "gate": ("channel", "scalar"),
    "cross": ("sinkhorn", "emd", "none"),
    "fusion": ("attention", "concat"),
}
_TINY_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@strict
class DementiaFusionConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of a [`DementiaFusionForClassification`].

    The paper's text was not available: what its abstract leaves open is decided here, and can be chosen. The defaults are BERT
    base and DeiT base with context-aware attention (global context), entropic transport and attention fusion.

    Args:
        text_config (`dict` or `PreTrainedConfig`): configuration of the encoder of transcripts, BERT-like.
        vision_config (`dict` or `PreTrainedConfig`): configuration of the encoder of spectrograms, ViT- or DeiT-like. Its width
            is that of the text encoder.
        num_attention_heads (`int`, *optional*): heads of the layer that attends within each modality; those of the text encoder
            if not given.
        intra (`str`): that layer: `"context"` (context-aware self-attention) or `"gate"` (self-attention with a gate model).
        context (`str`): context of the tokens of `"context"`: `"global"`, the mean over the sequence; `"deep"`, the states
            of all lower layers of the encoder; `"deep-global"`, the means of all its layers.
        gate (`str`): gate of `"gate"`: one for each `"channel"` of queries and keys, or a `"scalar"` for each.
        cross (`str`): transport between the modalities: `"sinkhorn"` (entropic), `"emd"` (exact; needs POT or scipy), or
            `"none"`.
        ot_reg (`float`): weight of the entropy, for costs between 0 and 1.
        ot_iters (`int`): sweeps of the entropic transport.
        fusion (`str`): how the streams become one vector: `"attention"` or `"concat"`.
        attention_dropout (`float`): dropout of the attention weights within each modality.
        classifier_dropout (`float`): dropout before the classifier.
        label_smoothing (`float`): share of the label that is spread over all classes, in the loss. With `Trainer`, leave its
            `label_smoothing_factor` at 0.
        initializer_range (`float`): standard deviation of new weights.
    """

    model_type = "dementia_fusion"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="deit"),
    }
    keys_to_ignore_at_inference = [
        "streams",
        "fusion_weights",
        "text_to_image_plan",
        "image_to_text_plan",
        "text_hidden_states",
        "image_hidden_states",
        "attentions",
    ]
    variants = {
        "context-global": {},
        "context-deep": {"context": "deep"},
        "context-deep-global": {"context": "deep-global"},
        "gate": {"intra": "gate"},
    }
    tiny = {
        "text_config": {"model_type": "bert", "vocab_size": 99, "max_position_embeddings": 64, **_TINY_ENCODER},
        "vision_config": {"model_type": "deit", "image_size": 32, "patch_size": 16, **_TINY_ENCODER},
        "ot_iters": 10,
    }
    ranges = {
        "ot_reg": POSITIVE,
        "ot_iters": SIZE,
        "classifier_dropout": RATE,
        "label_smoothing": RATE,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    num_attention_heads: int | None = None
    intra: str = "context"
    context: str = "global"
    gate: str = "channel"
    cross: str = "sinkhorn"
    ot_reg: float | int = 0.1
    ot_iters: int = 50
    fusion: str = "attention"
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    label_smoothing: float | int = 0.1
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_attention_heads is None:
            self.num_attention_heads = self.text_config.num_attention_heads

    @property
    def hidden_size(self) -> int:
        """Width of both encoders, and of everything behind them."""
        return self.text_config.hidden_size

    @property
    def num_streams(self) -> int:
        """Number of fused vectors: two modalities, and each of them mapped to the other."""
        return 2 if self.cross == "none" else 4

    def context_size(self, modality: str) -> int:
        """Width of the context vectors of `"text"` or `"vision"`."""
        layers = getattr(self, f"{modality}_config").num_hidden_layers
        states = {"global": 1, "deep": layers, "deep-global": layers + 1}[self.context]
        return states * self.hidden_size

    def validate_dementia_fusion(self):
        """Part of the validation that `@strict` runs."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        widths = [getattr(config, "hidden_size", None) for config in (self.text_config, self.vision_config)]
        if widths[0] != widths[1]:
            raise ValueError(
                "Both encoders must have the same hidden_size, because optimal transport compares their hidden "
                f"states; got {widths[0]} (text) and {widths[1]} (vision)."
            )
        if widths[0] is not None and widths[0] % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({widths[0]}) must be divisible by num_attention_heads ({self.num_attention_heads})."
            )


__all__ = ["DementiaFusionConfig"]
