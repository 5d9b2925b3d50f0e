"""Official checkpoints of HAT (XPixelGroup/HAT)."""

import math

from hf_attn.architectures.restoration.converting import (
    given_fields,
    renaming,
    shape_of,
    shell_fields,
)
from hf_attn.checkpoints.official import Converted, StateDict

from .configuration_hat import HATConfig
from .modeling_hat import HATForImageSuperResolution


_NAMES = renaming(
    "hat",
    (r"^relative_position_index_(SA|OCA)$", None),
    (r"^layers\.(\d+)\.residual_group\.blocks\.(\d+)\.", r"groups.\1.blocks.\2."),
    (r"^layers\.(\d+)\.residual_group\.overlap_attn\.", r"groups.\1.overlapping_block."),
    (r"^layers\.(\d+)\.conv\.", r"groups.\1.convolution."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.", ".attention."),
    (r"\.overlapping_block\.(qkv\.|proj\.|relative_position_bias_table$)", r".overlapping_block.attention.\1"),
    (r"\.conv_block\.cab\.0\.", ".channel_branch.conv1."),
    (r"\.conv_block\.cab\.2\.", ".channel_branch.conv2."),
    (r"\.conv_block\.cab\.3\.attention\.1\.", ".channel_branch.squeeze."),
    (r"\.conv_block\.cab\.3\.attention\.3\.", ".channel_branch.excite."),
)
_OWN = {name: name for name in ("compress_ratio", "squeeze_factor", "conv_scale", "overlap_ratio")}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict of the generator (`params_ema` or `params` of a checkpoint file).
        config: official constructor arguments. None is needed unless it differs from the published models and cannot be
            read off the weights: `conv_scale`, `img_range`, `qk_scale`, the drop rates.
    """
    inferred = _infer(official)
    fields = inferred | given_fields(config, _OWN, (), inferred, "hat")
    state, dropped = _NAMES.state_dict(official), _NAMES.dropped(official)
    return Converted(HATForImageSuperResolution, HATConfig(**fields), state, dropped)


def _infer(weights) -> dict:
    fields = shell_fields(weights, "hat")
    embed_dim = fields["embed_dim"]
    depths, num_heads = [], []
    while (prefix := f"layers.{len(depths)}.residual_group.") + "overlap_attn.norm1.weight" in weights:
        depth = 0
        while f"{prefix}blocks.{depth}.norm1.weight" in weights:
            depth += 1
        depths.append(depth)
        num_heads.append(shape_of(weights, f"{prefix}overlap_attn.relative_position_bias_table", "hat")[1])
    block = "layers.0.residual_group.blocks.0."
    window_size = (math.isqrt(shape_of(weights, f"{block}attn.relative_position_bias_table", "hat")[0]) + 1) // 2
    overlap_table = shape_of(weights, "layers.0.residual_group.overlap_attn.relative_position_bias_table", "hat")
    overlap = math.isqrt(overlap_table[0]) + 1 - 2 * window_size
    ratio = overlap / window_size
    fields |= {
        "depths": depths,
        "num_heads": num_heads,
        "window_size": window_size,
        # The ratio is rounded down to whole pixels, and a quotient may come out a bit too small.
        "overlap_ratio": ratio if int(ratio * window_size) == overlap else (overlap + 0.5) / window_size,
        "compress_ratio": embed_dim // shape_of(weights, f"{block}conv_block.cab.0.weight", "hat")[0],
        "squeeze_factor": embed_dim // shape_of(weights, f"{block}conv_block.cab.3.attention.1.weight", "hat")[0],
        "mlp_ratio": shape_of(weights, f"{block}mlp.fc1.weight", "hat")[0] / embed_dim,
        "qkv_bias": f"{block}attn.qkv.bias" in weights,
    }
    return fields
