# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of RMT."""

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.ranges import FACTOR, POSITIVE, SIZE
from hf_attn.architectures.staged_vision.configuration import StagedVisionConfig


_T = {
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 8, 2],
    "num_attention_heads": [4, 4, 8, 16],
    "decay_ranges": [4, 4, 6, 6],
    "mlp_ratios": [3, 3, 3, 3],
    "axis_decomposed": [True, True, False, False],
    "drop_path_rate": 0.1,
    "num_labels": 1000,
}
_S = {
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [3, 4, 18, 4],
    "num_attention_heads": [4, 4, 8, 16],
    "decay_ranges": [4, 4, 6, 6],
    "mlp_ratios": [4, 4, 3, 3],
    "axis_decomposed": [True, True, True, False],
    "drop_path_rate": 0.15,
    "num_labels": 1000,
}
_B = {
    "hidden_sizes": [80, 160, 320, 512],
    "depths": [4, 8, 25, 8],
    "num_attention_heads": [5, 5, 10, 16],
    "decay_ranges": [5, 5, 6, 6],
    "mlp_ratios": [4, 4, 3, 3],
    "axis_decomposed": [True, True, True, False],
    "layerscales": [False, False, True, True],
    "drop_path_rate": 0.4,
    "num_labels": 1000,
}
_L = {
    "hidden_sizes": [112, 224, 448, 640],
    "depths": [4, 8, 25, 8],
    "num_attention_heads": [7, 7, 14, 20],
    "decay_ranges": [6, 6, 6, 6],
    "mlp_ratios": [4, 4, 3, 3],
    "axis_decomposed": [True, True, True, False],
    "layerscales": [False, False, True, True],
    "drop_path_rate": 0.5,
    "num_labels": 1000,
}


@strict
class RMTConfig(StagedVisionConfig):
    r"""Configuration of a [`RMTForImageClassification`]; the defaults are RMT-T.

    Args:
        image_size (`int`): side of the images that the model is evaluated on; the model itself takes any size.
        num_channels (`int`): channels of the images.
        hidden_sizes (`list[int]`): channels of each stage.
        depths (`list[int]`): number of blocks of each stage.
        num_attention_heads (`list[int]`): heads of each stage.
        decay_initial_values (`list[float]`), decay_ranges (`list[float]`): head `a` of `h` decays with the Manhattan distance
            between positions by the factor `1 - 2 ** -(initial + range * a / h)` for each step.
        mlp_ratios (`list[float]`): width inside the MLP of each stage, in units of its hidden size.
        axis_decomposed (`list[bool]`): stages that attend along the rows and then along the columns instead of to all
            positions at once. This is another function, of lower cost.
        layerscales (`list[bool]`): stages with a learned factor for each channel on both branches of a block.
        layer_scale_init_value (`float`): its initial value.
        projection_dim (`int`): channels that the last stage is projected to before the mean over all positions.
        token_labeling (`bool`): a second classifier on each position, for training with token labels. In evaluation the
            largest of its logits over all positions counts half.
        drop_path_rate (`float`): stochastic depth of the last block; it grows linearly from 0.
        layer_norm_eps (`float`): epsilon of the LayerNorms of the blocks.
        batch_norm_eps (`float`): epsilon of the BatchNorms.
        initializer_range (`float`): standard deviation of the initial weights of the linear layers.
        out_features (`list[str]`, *optional*): stages that a backbone returns, of `"stem"`, `"stage1"`...
        out_indices (`list[int]`, *optional*): the same by number.
    """

    model_type = "rmt"
    keys_to_ignore_at_inference = ["class_logits", "token_logits", "hidden_states", "attentions"]
    per_stage = (
        "hidden_sizes",
        "depths",
        "num_attention_heads",
        "decay_initial_values",
        "decay_ranges",
        "mlp_ratios",
        "axis_decomposed",
        "layerscales",
    )
    variants = {
        "rmt_t": _T,
        "rmt_s": _S,
        "rmt_b": _B,
        "rmt_l": _L,
        "rmt_s_token_label": {**_S, "token_labeling": True},
        "rmt_b_token_label": {**_B, "token_labeling": True},
        "rmt_l_token_label": {**_L, "token_labeling": True},
    }

    tiny = {
        "image_size": 64,
        "hidden_sizes": [8, 16, 16, 24],
        "depths": [1, 1, 2, 1],
        "num_attention_heads": [1, 2, 2, 3],
        "mlp_ratios": [2, 2, 2, 2],
        "axis_decomposed": [False, True, True, False],
        "layerscales": [False, False, True, True],
        "layer_scale_init_value": 0.5,
        "projection_dim": 20,
    }
    # A decay is 1 - 2 ** -exponent.
    ranges = {"decay_initial_values": POSITIVE, "decay_ranges": FACTOR, "projection_dim": SIZE}

    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 8, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (4, 4, 8, 16)
    decay_initial_values: list[float | int] | tuple[float | int, ...] = (2, 2, 2, 2)
    decay_ranges: list[float | int] | tuple[float | int, ...] = (4, 4, 6, 6)
    mlp_ratios: list[float | int] | tuple[float | int, ...] = (3, 3, 3, 3)
    axis_decomposed: list[bool] | tuple[bool, ...] = (True, True, False, False)
    layerscales: list[bool] | tuple[bool, ...] = (False, False, False, False)
    layer_scale_init_value: float = 1e-6
    projection_dim: int = 1024
    token_labeling: bool = False
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    batch_norm_eps: float = 1e-5

    @property
    def crop_ratio(self) -> float:
        """Side of the centre crop over the shortest side of the resized image."""
        if self.image_size > 224:
            return 1.0
        return 0.96 if self.token_labeling else 0.875

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        super().validate_architecture()
        for stage, (hidden_size, heads) in enumerate(zip(self.hidden_sizes, self.num_attention_heads, strict=True)):
            if hidden_size % (2 * heads) != 0:
                raise ValueError(
                    f"hidden_sizes[{stage}] ({hidden_size}) must be a multiple of twice num_attention_heads[{stage}] "
                    f"({heads}): queries and keys are rotated in pairs of channels."
                )
        if self.hidden_sizes[0] % 2 != 0:
            raise ValueError(f"hidden_sizes[0] must be even, got {self.hidden_sizes[0]}.")


__all__ = ["RMTConfig"]
