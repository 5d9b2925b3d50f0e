"""Weights under the names of the card: `qk_weight` and `value_weight` of attention, or `mlp_weight` and `mlp_value`."""

import torch

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict

from .configuration_random_feature_attention import RandomFeatureAttentionConfig, RandomFeatureMLPConfig
from .modeling_random_feature_attention import RandomFeatureAttentionModel, RandomFeatureMLPModel


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert a random draw with or without values; without them the values are 0, for `fit_ridge` to find.

    Args:
        official: `qk_weight` `(M, d + 1, d + 1)`, the effective matrices, and `value_weight` `(M, d + 1)`; or `mlp_weight`
            `(units, (N + 1) d + 1)` and `mlp_value` `(units,)`. The model has their dtype.
        config: `input_dim` and `num_keys`, and `biased` and `weight_std`, which say how the draw was made.
    """
    if config.get("activation", "relu") != "relu":
        raise ConversionError(f"The activation must be relu, got {config['activation']!r}.")
    fields = {"num_keys": config["num_keys"]}
    if "qk_weight" in official:
        frozen, value = official["qk_weight"], "value_weight"
        heads, width = frozen.shape[:2]
        config.agree(input_dim=width - 1, num_heads=heads)
        fields |= {"input_dim": width - 1, "num_heads": heads, "biased": config.get("biased", False)}
        fields["weight_std"] = config.get("weight_std", 0.5)
        model_class, config_class = RandomFeatureAttentionModel, RandomFeatureAttentionConfig
        shape, names = (heads, width), ("qk_weight", value)
    else:
        frozen, value = official["mlp_weight"], "mlp_value"
        config.agree(mlp_width=len(frozen))
        config.leave("num_heads", "biased", "weight_std")
        fields |= {"input_dim": config["input_dim"], "num_units": len(frozen)}
        model_class, config_class = RandomFeatureMLPModel, RandomFeatureMLPConfig
        shape, names = (len(frozen),), ("mlp_weight", value)
    config.leave("mlp_width")
    # How the golden values were fitted, and to what.
    config.leave("ridge_lambda", "target", "noise_std")
    values = official[value] if value in official else torch.zeros(shape, dtype=frozen.dtype)
    return Converted(
        model_class, config_class(**fields, dtype=frozen.dtype), dict(zip(names, (frozen, values), strict=True))
    )
