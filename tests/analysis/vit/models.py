"""Tiny models of every supported kind, with images of 24 x 16 pixels where the model supports it."""

import torch
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_attn import SigmaReparamViTConfig, SigmaReparamViTForImageClassification


SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32, "patch_size": 4}
OBLONG = {**SMALL, "image_size": [24, 16], "num_labels": 5}


def vit(**config) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**{**OBLONG, **config}))


def timm_vit(**arguments) -> VisionTransformer:
    return VisionTransformer(
        **{
            "img_size": (24, 16),
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 3,
            "num_classes": 5,
            **arguments,
        }
    )


MODELS = {
    "vit": vit,
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**OBLONG)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL, image_size=16, num_labels=5)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SMALL, image_size=16, num_labels=5, num_register_tokens=3)
    ),
    "beit": lambda: BeitForImageClassification(
        BeitConfig(**SMALL, image_size=16, num_labels=5, use_relative_position_bias=True)
    ),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=16)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=16)),
    "sigma_reparam": lambda: SigmaReparamViTForImageClassification(
        SigmaReparamViTConfig(**OBLONG, initializer_range=0.3)
    ),
    "timm": timm_vit,
    "timm_average": lambda: timm_vit(global_pool="avg", class_token=False),
    "timm_registers": lambda: timm_vit(reg_tokens=2, qk_norm=True),
}
#: kinds whose images are 16 x 16 pixels
SQUARE = ("beit", "clip", "siglip", "dinov2", "dinov2_with_registers")
#: number of prefix tokens of each kind
PREFIX = dict.fromkeys(MODELS, 1) | {
    "dinov2_with_registers": 4,
    "siglip": 0,
    "timm_average": 0,
    "timm_registers": 3,
}


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model whose weights are large enough for its heads to differ, and images."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Without LayerNorm the signal would grow without bound.
            if parameter.dim() == 2 and name != "sigma_reparam":
                parameter.normal_(std=0.3)
    square = name in SQUARE
    return model, torch.randn(3, 3, 16 if square else 24, 16)


def implementations(model: torch.nn.Module) -> tuple[str | None, ...]:
    return ("eager", "sdpa") if isinstance(model, PreTrainedModel) else (None,)


__all__ = ["MODELS", "PREFIX", "build", "implementations", "timm_vit", "vit"]
