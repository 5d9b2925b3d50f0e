# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the region proposal network of SD-RPN."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.ranges import SIZE, Range
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


#: task -> threshold of the RoI map; "default" is for any other task
LLAVA_THRESHOLDS = {
    "default": 0.15,
    "textvqa": 0.15,
    "infovqa": 0.15,
    "chartqa": 0.15,
    "pope": 0.15,
    "docvqa": 0.1,
    "vstar": 0.1,
    "hrbench": 0.1,
    "ocrbench": 0.05,
}
QWEN_3B_THRESHOLDS = {"default": 0.1, "textvqa": 0.15, "vstar": 0.175, "ocrbench": 0.03}
QWEN_7B_THRESHOLDS = {"default": 0.1, "textvqa": 0.075, "vstar": 0.075, "ocrbench": 0.05}

_LLAVA = {"base_model_type": "llava", "branch_layer": 15, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}
_QWEN = {
    "base_model_type": "qwen2_5_vl",
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6,
    "attention_bias": True,
    "attention_output_bias": False,
}


@strict
class SdRpnConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of an [`SdRpnModel`]: decoder layers that branch off a multimodal language model and say where in the
    image to look.

    The defaults are those of the network for LLaVA-1.5-7B.

    Args:
        base_model_type (`str`): `model_type` of the base: `llava`, `llava_next` or `qwen2_5_vl`.
        base_model_name_or_path (`str`, *optional*): the base that the network was made from or trained with.
        base_num_hidden_layers (`int`): number of decoder layers of the base.
        branch_layer (`int`): number of decoder layers of the base that run before the network (the paper's B, `twig_K` of
            the official code).
        num_hidden_layers (`int`): number of layers of the network (the paper's R, `twig_T`). The last of them is used for
            its queries and keys only.
        attention_output_bias (`bool`, *optional*): whether the output projection has a bias; as `attention_bias` (which is
            about queries, keys and values) if not given.
        use_norm (`bool`, *optional*): whether the final norm is applied before the last layer; true for the LLaVA models and
            false for Qwen2.5-VL if not given.
        use_rope (`bool`, *optional*): whether query and keys of the RoI map are rotated; the opposite of `use_norm` in the
            published models, and the default.
        multi_head (`bool`): whether the map is the mean over the heads of scaled dot products; if not, it is one dot product
            over all dimensions, not scaled.
        thresholds (`dict[str, float]`, *optional*): name of a task -> threshold of the RoI map, with the entry `default` for
            all others; those of the paper's evaluation for the base if not given.

    The other arguments are those of the decoder layers of the base.
    """

    model_type = "sd_rpn"
    variants = {
        "llava_v1.5_7b": {**_LLAVA, "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"},
        "llava_v1.5_13b": {
            **_LLAVA,
            "base_model_name_or_path": "llava-hf/llava-1.5-13b-hf",
            "base_num_hidden_layers": 40,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
        },
        "qwen2_5_vl_3b": {
            **_QWEN,
            "base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
            "base_num_hidden_layers": 36,
            "branch_layer": 21,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "thresholds": QWEN_3B_THRESHOLDS,
        },
        "qwen2_5_vl_7b": {
            **_QWEN,
            "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
            "base_num_hidden_layers": 28,
            "branch_layer": 16,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    }

    tiny = {
        "base_num_hidden_layers": 6,
        "branch_layer": 2,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    # A negative threshold is a fraction of the largest probability.
    ranges = {"base_num_hidden_layers": SIZE, "branch_layer": SIZE, "thresholds": Range(at_least=-1, at_most=1)}

    base_model_type: str = "llava"
    base_model_name_or_path: str | None = None
    base_num_hidden_layers: int = 32
    branch_layer: int = 15
    num_hidden_layers: int = 3
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    use_norm: bool | None = None
    use_rope: bool | None = None
    multi_head: bool = True
    thresholds: dict[str, float | int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        is_qwen = self.base_model_type == "qwen2_5_vl"
        if self.use_norm is None:
            self.use_norm = not is_qwen
        if self.use_rope is None:
            self.use_rope = not self.use_norm
        if self.thresholds is None:
            self.thresholds = dict(QWEN_7B_THRESHOLDS if is_qwen else LLAVA_THRESHOLDS)
        super().__post_init__(**kwargs)

    def threshold(self, task: str | None = None) -> float:
        """Threshold of the RoI map for a task.

        Raises:
            ValueError: if the task is not known; the message lists the ones that are.
        """
        if task is None:
            return self.thresholds["default"]
        name = task.lower()
        if name not in self.thresholds:
            raise ValueError(
                f"There is no threshold for the task {task!r}. Tasks: {', '.join(self.thresholds)}. Alternatively, "
                "pass a number."
            )
        return self.thresholds[name]

    def validate_branch(self):
        """Part of the validation that `@strict` runs."""
        if self.base_model_type not in ("llava", "llava_next", "qwen2_5_vl"):
            raise ValueError(
                f"base_model_type must be 'llava', 'llava_next' or 'qwen2_5_vl', got {self.base_model_type!r}."
            )
        last = self.base_num_hidden_layers - self.num_hidden_layers
        if not 1 <= self.branch_layer <= last:
            raise ValueError(
                f"branch_layer must be between 1 and {last}, so that the {self.num_hidden_layers} layers of the "
                f"network correspond to layers of the base, which has {self.base_num_hidden_layers}; got "
                f"{self.branch_layer}."
            )
        if "default" not in self.thresholds:
            raise ValueError(f"thresholds needs an entry 'default', got {self.thresholds}.")


__all__ = ["SdRpnConfig"]
