# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the BiFormer models."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.ranges import COUNT, SIZE, Range
from hf_attn.architectures.staged_vision.configuration import StagedVisionConfig


#: heads of full attention, for any width
NUM_FULL_ATTENTION_HEADS = 8

_STL = {
    "layout": "stl",
    "hidden_sizes": [96, 192, 384, 768],
    "depths": [2, 2, 6, 2],
    "mlp_ratios": [4, 4, 4, 4],
    "before_attn_dwconv": 0,
    "num_labels": 1000,
}


@strict
class BiFormerConfig(StagedVisionConfig):
    r"""Configuration of a [`BiFormerForImageClassification`] (arXiv 2303.08810); the defaults are those of BiFormer-T.

    Args:
        image_size (`int`): side of the images that the model is evaluated on. The model takes any size that its regions
            divide, or any at all with `auto_pad`.
        num_channels (`int`): channels of the images.
        layout (`str`): `"biformer"` (overlapping patches); `"stl"` (the layout of Swin-T, for ablations); or `"stl_nchw"`
            (its later code, which pads queries, keys and values instead of the input).
        hidden_sizes (`list[int]`): width of each stage.
        depths (`list[int]`): number of blocks of each stage.
        mlp_ratios (`list[float]`): hidden width of the MLPs of each stage, relative to `hidden_sizes`.
        n_win (`int` or `list[int]`): regions along each side of the feature map, for all stages or for each. Their number
            is fixed; their size follows the input.
        topks (`list[int]`): for each stage the number of regions that a region attends to; or -1 for full attention; -2
            for full attention with a depthwise convolution of its input added; 0 for convolutions in place of attention.
            In the layout `"stl_nchw"`, -1 adds the depthwise convolution of the values, and -2 and 0 do not exist.
        head_dim (`int`): width of a head of bi-level routing attention. Full attention has 8 heads always.
        qk_dims (`list[int]`, *optional*): width of queries and keys of each stage; `hidden_sizes` if not given.
        side_dwconv (`int`): kernel size of the depthwise convolution beside attention (LePE); 0 for none.
        before_attn_dwconv (`int`): kernel size of the depthwise convolution before attention, 3 or 0 for none.
        auto_pad (`bool`): whether routing attention pads its input, right and bottom, to a multiple of `n_win`. Padding is
            not masked. The layout `"stl_nchw"` always pads.
        kv_pool (`str`, *optional*): pooling of the keys and values of each region: `"ada_avgpool"` or `"ada_maxpool"` to
            `kv_per_wins`, `"avgpool"` or `"maxpool"` by `kv_downsample_ratios`. Published models have none.
        kv_per_wins (`list[int]`, *optional*): side of the pooled grid of each stage.
        kv_downsample_ratios (`list[int]`, *optional*): kernel and stride of the pooling of each stage.
        soft_routing (`bool`): whether keys and values are multiplied by the softmax of the routing scores.
        diff_routing (`bool`): whether gradients flow through the routing scores; needs `soft_routing`.
        param_routing (`bool`): whether routing has a linear map of its own; needs `diff_routing`.
        pre_norm (`bool`): whether the norms come before attention and MLP, or after their residuals.
        mlp_dwconv (`bool`): whether the MLPs have a 3x3 depthwise convolution before their activation.
        layer_scale_init_value (`float`, *optional*): initial scale of the branches; no scale if not positive.
        hidden_act (`str`): activation of the MLPs.
        drop_path_rate (`float`): stochastic depth of the last block; grows linearly from 0.
        initializer_range (`float`): standard deviation of the initial weights of linear layers.
        layer_norm_eps (`float`): epsilon of the layer norms.
        batch_norm_eps (`float`): epsilon of the batch norms.
        out_features (`list[str]`, *optional*): stages that a backbone returns, of `"stem"`, `"stage1"`...
        out_indices (`list[int]`, *optional*): the same by number.
    """

    model_type = "biformer"
    per_stage = ("hidden_sizes", "depths", "mlp_ratios", "n_win", "topks", "qk_dims")
    variants = {
        "biformer_tiny": {"num_labels": 1000},
        "biformer_small": {"depths": [4, 4, 18, 4], "drop_path_rate": 0.15, "num_labels": 1000},
        "biformer_base": {"hidden_sizes": [96, 192, 384, 768], "depths": [4, 4, 18, 4], "num_labels": 1000},
        "biformer_stl": {**_STL, "drop_path_rate": 0.1},
        "biformer_stl_nchw": {**_STL, "layout": "stl_nchw", "topks": [1, 4, 16, -1], "drop_path_rate": 0.1},
    }

    #: two stages with routing attention, then full attention; maps of 16, 8 and 4 positions along a side
    tiny = {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "depths": [1, 1, 1],
        "mlp_ratios": [2, 2, 2],
        "n_win": 2,
        "topks": [1, 3, -2],
        "head_dim": 8,
    }
    ranges = {
        "n_win": SIZE,
        "topks": Range(at_least=-2),
        "qk_dims": SIZE,
        "side_dwconv": COUNT,
        "before_attn_dwconv": COUNT,
        # -1 in stages without routing attention
        "kv_per_wins": Range(at_least=1, also=(-1,)),
        "kv_downsample_ratios": Range(at_least=1, also=(-1,)),
    }

    layout: Literal["biformer", "stl", "stl_nchw"] = "biformer"
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 8, 2)
    mlp_ratios: list[float | int] | tuple[float | int, ...] = (3, 3, 3, 3)
    n_win: int | list[int] | tuple[int, ...] = 7
    topks: list[int] | tuple[int, ...] = (1, 4, 16, -2)
    head_dim: int = 32
    qk_dims: list[int] | tuple[int, ...] | None = None
    side_dwconv: int = 5
    before_attn_dwconv: int = 3
    auto_pad: bool = False
    kv_pool: Literal["ada_avgpool", "ada_maxpool", "avgpool", "maxpool"] | None = None
    kv_per_wins: list[int] | tuple[int, ...] | None = None
    kv_downsample_ratios: list[int] | tuple[int, ...] | None = None
    soft_routing: bool = False
    diff_routing: bool = False
    param_routing: bool = False
    pre_norm: bool = True
    mlp_dwconv: bool = False
    layer_scale_init_value: float | int | None = None
    hidden_act: str = "gelu"
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    batch_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if isinstance(self.n_win, int):
            self.n_win = [self.n_win] * len(self.depths)
        if self.qk_dims is None:
            self.qk_dims = list(self.hidden_sizes)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        super().validate_architecture()
        if self.kv_pool is not None:
            name = "kv_per_wins" if self.kv_pool.startswith("ada") else "kv_downsample_ratios"
            value = getattr(self, name)
            if value is None or len(value) != len(self.depths):
                raise ValueError(f"{name} must have one entry per stage ({len(self.depths)}), got {value}.")
        for stage, topk in enumerate(self.topks, start=1):
            self._validate_stage(f"stage {stage}", topk, self.n_win[stage - 1])
            width, qk_dim = self.hidden_sizes[stage - 1], self.qk_dims[stage - 1]
            if topk > 0:
                heads = qk_dim // self.head_dim
                if heads == 0 or qk_dim % heads or width % heads:
                    raise ValueError(
                        f"stage {stage}: qk_dims={qk_dim} with head_dim={self.head_dim} results in {heads} heads, "
                        f"which must divide qk_dims and hidden_sizes={width}."
                    )
            elif topk < 0 and width % NUM_FULL_ATTENTION_HEADS:
                raise ValueError(
                    f"stage {stage}: full attention has {NUM_FULL_ATTENTION_HEADS} heads, which must divide "
                    f"hidden_sizes={width}."
                )

    def _validate_stage(self, stage: str, topk: int, n_win: int):
        special = (-1,) if self.layout == "stl_nchw" else (-2, -1, 0)
        if topk < 1 and topk not in special:
            raise ValueError(
                f"{stage}: topks must be positive or one of {special} in the layout {self.layout!r}, got {topk}."
            )
        if topk > n_win**2:
            raise ValueError(
                f"{stage}: topks={topk} is more than the {n_win**2} regions of n_win={n_win}. Use at most {n_win**2}, "
                "or -1 for full attention."
            )

    def validate_routing(self):
        """Part of the validation that `@strict` runs."""
        if self.diff_routing and not self.soft_routing:
            raise ValueError("diff_routing needs soft_routing: without it no gradient reaches the routing scores.")
        if self.param_routing and not self.diff_routing:
            raise ValueError("param_routing needs diff_routing: without it its weights would never be trained.")
        if self.layout == "stl_nchw" and (self.kv_pool or self.soft_routing):
            raise ValueError("The layout 'stl_nchw' supports neither kv_pool nor soft_routing.")


__all__ = ["BiFormerConfig"]
