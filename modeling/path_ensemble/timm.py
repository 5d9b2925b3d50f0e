"""timm's `VisionTransformer` in the terms of this family."""

import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from transformers import TimmWrapperConfig


#: timm's name -> ours
_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "dist_token": "vit.embeddings.distillation_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "fc_norm": "vit.layernorm",
    "head": "classifier",
    "head_dist": "distillation_classifier",
}
#: the same inside a block
_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "attention_scale",
    "ls2.gamma": "mlp_scale",
}


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
        "no position embedding of the class token": getattr(model, "no_embed_class", False),
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
        raise ValueError(f"A path ensemble cannot be made from this timm model, it has {', '.join(found)}.")
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
            f"A path ensemble cannot be made from timm's {config.architecture!r}, which is a {type(model).__name__}. It "
            "takes timm's VisionTransformer, and ViT and DeiT of transformers."
        )
    return fields_from_timm(model) | {"id2label": config.id2label, "label2id": config.label2id}


def state_from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's tensors under the names of [`PathEnsembleForImageClassification`]; those that have none keep theirs."""
    ours = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            module, _, kind = name.rpartition(".")
            ours[_NAMES.get(name) or (f"{_NAMES[module]}.{kind}" if module in _NAMES else name)] = tensor
            continue
        layer, part = f"vit.layers.{block[1]}.", block[2]
        module, _, kind = part.rpartition(".")
        if module == "attn.qkv":
            for projection, chunk in zip("qkv", tensor.chunk(3), strict=True):
                ours[f"{layer}attention.{projection}_proj.{kind}"] = chunk
        elif part in _BLOCK_NAMES:
            ours[layer + _BLOCK_NAMES[part]] = tensor
        else:
            ours[f"{layer}{_BLOCK_NAMES[module]}.{kind}" if module in _BLOCK_NAMES else name] = tensor
    return ours
