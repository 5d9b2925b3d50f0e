"""Official checkpoints of DRCT (ming053l/DRCT)."""

import math

from hf_attn.architectures.restoration.converting import (
    checkpoint_weights,
    given_fields,
    rename,
    shape_of,
    shell_fields,
)
from hf_attn.checkpoints.official import Converted, StateDict

from .configuration_drct import DRCTConfig
from .modeling_drct import DRCTForImageSuperResolution


_MODULES = {
    **{
        rf"layers\.(\d+)\.swin{number}\.{official}": rf"{{}}.groups.\1.blocks.{number - 1}.{name}"
        for number in range(1, 6)
        for official, name in (
            ("norm1", "layernorm_before"),
            ("attn", "attention"),
            (r"attn\.(qkv|proj)", r"attention.\2"),
            ("norm2", "layernorm_after"),
            (r"mlp\.(fc1|fc2)", r"mlp.\2"),
        )
    },
    **{rf"layers\.(\d+)\.adjust{number}": rf"{{}}.groups.\1.adjust.{number - 1}" for number in range(1, 6)},
}
_DROPPED = r"layers\.\d+\.swin[1-5]\.(attn\.relative_position_index|attn_mask)"
#: arguments inherited from HAT's class, without an effect
_WITHOUT_EFFECT = ("compress_ratio", "squeeze_factor", "conv_scale", "overlap_ratio")


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see :func:`hf_attn.checkpoints.official.from_official`.

    Args:
        official: `params_ema` or `params` of a checkpoint file, or the state dict itself.
        config: official constructor arguments. None is needed unless it differs from the published models and cannot be
            read off the weights: `img_range`, `qk_scale`, the drop rates, `depths`.
    """
    weights, aside = checkpoint_weights(official)
    inferred = _infer(weights)
    fields = inferred | given_fields(config, {"gc": "growth_channels"}, _WITHOUT_EFFECT, inferred, "drct")
    state = rename(weights, _MODULES, _DROPPED, prefix="drct", slug="drct")
    return Converted(DRCTForImageSuperResolution, DRCTConfig(**fields), state, aside)


def _infer(weights) -> dict:
    fields = shell_fields(weights, "drct")
    table = "layers.{}.swin1.attn.relative_position_bias_table"
    window_size = (math.isqrt(shape_of(weights, table.format(0), "drct")[0]) + 1) // 2
    num_heads = []
    while (name := table.format(len(num_heads))) in weights:
        num_heads.append(weights[name].shape[1])
    fields |= {
        "depths": [6] * len(num_heads),
        "num_heads": num_heads,
        "window_size": window_size,
        "growth_channels": shape_of(weights, "layers.0.adjust1.weight", "drct")[0],
        "mlp_ratio": shape_of(weights, "layers.0.swin1.mlp.fc1.weight", "drct")[0] / fields["embed_dim"],
        "qkv_bias": "layers.0.swin1.attn.qkv.bias" in weights,
    }
    return fields
