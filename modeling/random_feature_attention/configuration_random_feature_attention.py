# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configurations of random-feature attention and of the random-feature network that it is compared with."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.ranges import COUNT, POSITIVE, SIZE
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


@strict
class RandomFeatureAttentionConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of a [`RandomFeatureAttentionModel`]; the defaults are the paper's size.

    Args:
        input_dim (`int`): width of a token, d.
        num_keys (`int`): keys of a sequence, N. The query comes before them.
        num_heads (`int`): heads, M, each with a frozen random matrix and a trained vector of values.
        biased (`bool`): whether the random matrices have the mean `block-diag(I_d, 0)` instead of 0 (BRFA).
        weight_std (`float`): standard deviation of the entries of the random matrices. 0.5 gives scores of variance 1 for
            tokens of norm 1.
        seed (`int`): of the draw. A saved model keeps its matrices.
    """

    model_type = "random_feature_attention"
    attribute_map = {"hidden_size": "input_dim"}
    ranges: ClassVar = {"input_dim": SIZE, "num_keys": SIZE, "weight_std": POSITIVE, "seed": COUNT}
    variants: ClassVar = {
        "rfa": {},
        "brfa": {"biased": True},
        "rfa_small": {"input_dim": 8, "num_keys": 8, "num_heads": 200},
        "brfa_small": {"input_dim": 8, "num_keys": 8, "num_heads": 200, "biased": True},
    }
    tiny: ClassVar = {"input_dim": 4, "num_keys": 3, "num_heads": 8}

    input_dim: int = 16
    num_keys: int = 16
    num_heads: int = 1000
    biased: bool = False
    weight_std: float | int = 0.5
    seed: int = 0


@strict
class RandomFeatureMLPConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of a [`RandomFeatureMLPModel`]; the defaults have as many trained weights as those of
    [`RandomFeatureAttentionConfig`].

    Args:
        input_dim (`int`): width of a token, d.
        num_keys (`int`): keys of a sequence, N. The network reads the query and the keys side by side.
        num_units (`int`): units, each with a frozen random vector and a trained value.
        weight_std (`float`, *optional*): standard deviation of the entries of the random vectors, `(num_keys + 2) ** -0.5` if
            not given, which gives pre-activations of variance 1 for tokens of norm 1.
        seed (`int`): of the draw. A saved model keeps its vectors.
    """

    model_type = "random_feature_mlp"
    attribute_map = {"hidden_size": "input_dim"}
    ranges: ClassVar = {"input_dim": SIZE, "num_keys": SIZE, "num_units": SIZE, "weight_std": POSITIVE, "seed": COUNT}
    variants: ClassVar = {"rfmlp": {}, "rfmlp_small": {"input_dim": 8, "num_keys": 8, "num_units": 1800}}
    tiny: ClassVar = {"input_dim": 4, "num_keys": 3, "num_units": 40}

    input_dim: int = 16
    num_keys: int = 16
    num_units: int = 17000
    weight_std: float | int | None = None
    seed: int = 0

    def __post_init__(self, **kwargs):
        if self.weight_std is None:
            self.weight_std = (self.num_keys + 2) ** -0.5
        super().__post_init__(**kwargs)

    @classmethod
    def matching(cls, config: RandomFeatureAttentionConfig, **overrides) -> "RandomFeatureMLPConfig":
        """The configuration with as many trained weights as one of random-feature attention has."""
        units = config.num_heads * (config.input_dim + 1)
        fields = {"input_dim": config.input_dim, "num_keys": config.num_keys, "num_units": units, "seed": config.seed}
        return cls(**{**fields, **overrides})


__all__ = ["RandomFeatureAttentionConfig", "RandomFeatureMLPConfig"]
