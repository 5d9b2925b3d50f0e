"""timm's `VisionTransformer` in the terms of this family."""

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_attn.checkpoints.renaming import KEEP, Renaming, split_fused


if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from transformers import TimmWrapperConfig


_NAMES = Renaming(
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^dist_token$", "vit.embeddings.distillation_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^(fc_)?norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^head_dist\.", "distillation_classifier."),
    (r"^blocks\.(\d+)\.norm1\.", r"vit.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"vit.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"vit.layers.\1.attention.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"vit.layers.\1.mlp."),
    (r"^blocks\.(\d+)\.ls1\.gamma$", r"vit.layers.\1.attention_scale"),
    (r"^blocks\.(\d+)\.ls2\.gamma$", r"vit.layers.\1.mlp_scale"),
    KEEP,
)


def is_timm_model(model: object) -> bool:
    """Whether `model` is a `VisionTransformer` of timm; does not import timm."""
    timm = sys.modules.get("timm.models.vision_transformer")
    return timm is not None and isinstance(model, timm.VisionTransformer)


def fields_from_timm(model: "VisionTransformer") -> dict[str, Any]:
    """Fields of [`PathEnsembleConfig`] of a timm model.

    Raises:
        ValueError: if the model has parts that this family does not.
    """
    refused = {
        "no class token": model.cls_token is None,
        "register tokens": getattr(model, "reg_token", None) is not None,
        "no position embedding for the class token": getattr(model, "no_embed_class", False),
        "a norm before the blocks": not isinstance(model.norm_pre, nn.Identity),
        "attention pooling": getattr(model, "attn_pool", None) is not None,
        f"global_pool={model.global_pool!r}": model.global_pool not in ("token", "avg"),
        "patches that are not square": len(set(model.patch_embed.patch_size)) != 1,
        "an image size that is not square": len(set(model.patch_embed.img_size)) != 1,
        "normalised queries and keys": not isinstance(getattr(model.blocks[0].attn, "q_norm", None), nn.Identity),
        "an activation other than GELU": not isinstance(model.blocks[0].mlp.act, nn.GELU),
    }
    found = [what for what, present in refused.items() if present]
    if found:
        raise ValueError(f"A path ensemble cannot be made from this timm model: it has {', '.join(found)}.")
    block = model.blocks[0]
    norm_after_pooling = not isinstance(model.fc_norm, nn.Identity)
    return {
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": (model.fc_norm if norm_after_pooling else model.norm).eps,
        "num_labels": model.num_classes,
        "pooling": "mean" if model.global_pool == "avg" else "token",
        "norm_after_pooling": norm_after_pooling,
        "layer_scale_init_value": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "distillation_token": hasattr(model, "dist_token"),
        "distillation_head": hasattr(model, "head_dist"),
    }


def fields_from_timm_wrapper(config: "TimmWrapperConfig") -> dict[str, Any]:
    """Fields of [`PathEnsembleConfig`] of a timm model that transformers has loaded."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(config.architecture, num_classes=config.num_labels, **(config.model_args or {}))
    if not is_timm_model(model):
        raise ValueError(
            f"A path ensemble cannot be made from timm's {config.architecture!r}, which is a {type(model).__name__}. "
            "Supported are timm's VisionTransformer, and ViT and DeiT of transformers."
        )
    return fields_from_timm(model) | {"id2label": config.id2label, "label2id": config.label2id}


def state_from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's tensors under the names of [`PathEnsembleForImageClassification`]; those that have none keep theirs."""
    return split_fused(_NAMES.state_dict(state), "qkv")
