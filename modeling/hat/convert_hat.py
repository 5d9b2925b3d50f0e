"""Official checkpoints of HAT (XPixelGroup/HAT)."""

import math

from hf_attn.architectures.restoration.converting import (
    checkpoint_weights,
    given_fields,
    rename,
    shape_of,
    shell_fields,
)
from hf_attn.checkpoints.official import Converted, StateDict

from .configuration_hat import HATConfig
from .modeling_hat import HATForImageSuperResolution


_BLOCK = r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\."
_OVERLAP = r"layers\.(\d+)\.residual_group\.overlap_attn"
_MODULES = {
    _BLOCK + r"norm1": r"{}.groups.\1.blocks.\2.layernorm_before",
    _BLOCK + r"attn": r"{}.groups.\1.blocks.\2.attention",
    _BLOCK + r"attn\.(qkv|proj)": r"{}.groups.\1.blocks.\2.attention.\3",
    _BLOCK + r"conv_block\.cab\.0": r"{}.groups.\1.blocks.\2.channel_branch.conv1",
    _BLOCK + r"conv_block\.cab\.2": r"{}.groups.\1.blocks.\2.channel_branch.conv2",
    _BLOCK + r"conv_block\.cab\.3\.attention\.1": r"{}.groups.\1.blocks.\2.channel_branch.squeeze",
    _BLOCK + r"conv_block\.cab\.3\.attention\.3": r"{}.groups.\1.blocks.\2.channel_branch.excite",
    _BLOCK + r"norm2": r"{}.groups.\1.blocks.\2.layernorm_after",
    _BLOCK + r"mlp\.(fc1|fc2)": r"{}.groups.\1.blocks.\2.mlp.\3",
    _OVERLAP: r"{}.groups.\1.overlapping_block.attention",
    _OVERLAP + r"\.norm1": r"{}.groups.\1.overlapping_block.layernorm_before",
    _OVERLAP + r"\.(qkv|proj)": r"{}.groups.\1.overlapping_block.attention.\2",
    _OVERLAP + r"\.norm2": r"{}.groups.\1.overlapping_block.layernorm_after",
    _OVERLAP + r"\.mlp\.(fc1|fc2)": r"{}.groups.\1.overlapping_block.mlp.\2",
    r"layers\.(\d+)\.conv": r"{}.groups.\1.convolution",
}
_DROPPED = r"relative_position_index_(SA|OCA)"
_OWN = {name: name for name in ("compress_ratio", "squeeze_factor", "conv_scale", "overlap_ratio")}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see :func:`hf_attn.checkpoints.official.from_official`.

    Args:
        official: `params_ema` or `params` of a checkpoint file, or the state dict itself.
        config: official constructor arguments. None is needed unless it differs from the published models and cannot be
            read off the weights: `conv_scale`, `img_range`, `qk_scale`, the drop rates.
    """
    weights, aside = checkpoint_weights(official)
    inferred = _infer(weights)
    fields = inferred | given_fields(config, _OWN, (), inferred, "hat")
    state = rename(weights, _MODULES, _DROPPED, prefix="hat", slug="hat")
    return Converted(HATForImageSuperResolution, HATConfig(**fields), state, aside)


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
