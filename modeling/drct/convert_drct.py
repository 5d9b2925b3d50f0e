"""Official checkpoints of DRCT (ming053l/DRCT)."""

import math

from hf_attn.architectures.restoration.converting import (
    given_fields,
    renaming,
    shape_of,
    shell_fields,
)
from hf_attn.checkpoints.official import Converted, StateDict

from .configuration_drct import DRCTConfig
from .modeling_drct import DRCTForImageSuperResolution


_NAMES = renaming(
    "drct",
    (r"^layers\.\d+\.swin[1-5]\.(attn\.relative_position_index|attn_mask)$", None),
    (r"^layers\.(\d+)\.swin(\d)\.", lambda match: f"groups.{match[1]}.blocks.{int(match[2]) - 1}."),
    (r"^layers\.(\d+)\.adjust(\d)\.", lambda match: f"groups.{match[1]}.adjust.{int(match[2]) - 1}."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.", ".attention."),
)
#: arguments inherited from HAT's class, without an effect
_WITHOUT_EFFECT = ("compress_ratio", "squeeze_factor", "conv_scale", "overlap_ratio")


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict of the generator (`params_ema` or `params` of a checkpoint file).
        config: official constructor arguments. None is needed unless it differs from the published models and cannot be
            read off the weights: `img_range`, `qk_scale`, the drop rates, `depths`.
    """
    inferred = _infer(official)
    fields = inferred | given_fields(config, {"gc": "growth_channels"}, _WITHOUT_EFFECT, inferred, "drct")
    state, dropped = _NAMES.state_dict(official), _NAMES.dropped(official)
    return Converted(DRCTForImageSuperResolution, DRCTConfig(**fields), state, dropped)


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
